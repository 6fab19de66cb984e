// What the browser remembers for the page: the key of this tab, the theme, and the items. Where it forbids that, as some private
// windows do, or is full, the page remembers by itself until it is left.

const PLACE = `tinydiff${location.pathname}`; // two servers below one address have a memory each
const ITEM = `${PLACE}item-`;
const MOST = 200; // items kept

const own = new Map();

/** localStorage or sessionStorage, or null where the browser has none for us. */
function area(name) {
  try {
    return window[name];
  } catch {
    return null;
  }
}

export function recall(name, where = "localStorage") {
  return own.get(name) ?? area(where)?.getItem(name) ?? null;
}

export function remember(name, value, where = "localStorage") {
  try {
    area(where).setItem(name, value);
    own.delete(name);
  } catch {
    own.set(name, value);
  }
}

function names() {
  const storage = area("localStorage");
  const stored = storage ? Array.from({ length: storage.length }, (_, index) => storage.key(index)) : [];
  return [...new Set([...stored, ...own.keys()])].filter((name) => name.startsWith(ITEM));
}

function read(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

const nameOf = (item) => `${ITEM}${item.kind}-${item.id}`;

/** Earlier items, oldest first. Each item has an entry of its own, so that tabs never overwrite each other's. */
export function items() {
  return names().map((name) => read(recall(name))).filter((item) => item?.id).sort((a, b) => a.created - b.created);
}

export function keep({ id, kind, wish, status, seeds, parameters, seconds, created }) {
  remember(nameOf({ id, kind }), JSON.stringify({ id, kind, wish, status, seeds, parameters, seconds, created }));
  for (const oldest of items().slice(0, -MOST)) drop(oldest);
}

export function drop(item) {
  own.delete(nameOf(item));
  area("localStorage")?.removeItem(nameOf(item));
}

/** Report what other tabs do: added(item), removed({ kind, id }). */
export function onOthers(added, removed) {
  window.addEventListener("storage", ({ key, newValue, oldValue }) => {
    if (!key?.startsWith(ITEM)) return;
    if (newValue === null) removed(read(oldValue) ?? {});
    else if (read(newValue)) added(read(newValue));
  });
}
