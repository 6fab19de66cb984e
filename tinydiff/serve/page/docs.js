// Draws the OpenAPI document of this server.

const make = (name, fields = {}, ...inside) => {
  const made = Object.assign(document.createElement(name), fields);
  made.append(...inside.filter((part) => part !== null && part !== undefined));
  return made;
};
const code = (text) => make("code", { textContent: text });
/** A paragraph in which `this` is code. */
const prose = (text, fields) => make("p", fields, ...text.split("`").map((part, number) => (number % 2 ? code(part) : part)));

/** What a $ref points at. */
const found = (api, part) => (part?.$ref ? part.$ref.slice(2).split("/").reduce((at, name) => at[name], api) : part);

/** A schema's type in a few words; that it may be null, which means "not given", is said once for all. */
function typeOf(api, given) {
  const schema = found(api, given);
  if (given.$ref && schema.type === "object") return given.$ref.split("/").at(-1);
  if (schema.enum) return schema.enum.filter((value) => value !== null).map((value) => JSON.stringify(value)).join(" | ");
  if ("const" in schema) return JSON.stringify(schema.const);
  const several = schema.anyOf ?? schema.oneOf;
  if (several) return several.filter((one) => one.type !== "null").map((one) => typeOf(api, one)).join(" | ");
  if (schema.type === "array") return `list of ${typeOf(api, schema.items ?? {})}`;
  if (schema.contentMediaType || schema.format === "binary") return "file";
  return [schema.type ?? "anything"].flat().filter((type) => type !== "null").join(" | ");
}

function limits(given) {
  const low = given.exclusiveMinimum !== undefined ? `above ${given.exclusiveMinimum}` : given.minimum !== undefined ? `from ${given.minimum}` : "";
  return [low, given.maximum !== undefined ? `to ${given.maximum}` : "", given.default !== undefined ? `default ${JSON.stringify(given.default)}` : ""];
}

function fieldsOf(api, given) {
  const schema = found(api, given);
  const rows = Object.entries(schema.properties ?? {}).map(([name, inner]) => {
    const field = { ...found(api, inner), ...inner };
    const one = field.anyOf?.find((part) => part.minimum !== undefined || part.exclusiveMinimum !== undefined);
    const said = limits({ ...one, ...field }).filter(Boolean).join(" ");
    const must = schema.required?.includes(name) ? make("span", { className: "tag", textContent: "required" }) : null;
    return make("tr", {}, make("th", { scope: "row" }, code(name), " ", must), make("td", {}, code(typeOf(api, inner)), said ? ` ${said}` : ""),
      make("td", { textContent: field.description ?? "" }));
  });
  return rows.length ? make("div", { className: "scroll" }, make("table", {}, make("tbody", {}, ...rows))) : null;
}

function curl(api, method, path, body) {
  const lines = [`curl ${method === "get" ? "" : `-X ${method.toUpperCase()} `}${new URL(path.slice(1), document.baseURI)}`];
  const example = body?.["application/json"]?.example;
  if (example) lines.push(`-H "Content-Type: application/json"`, `-d '${JSON.stringify(example)}'`);
  return make("pre", { tabIndex: 0 }, code(lines.join(" \\\n  ")));
}

function operation(api, method, path, one, id) {
  const body = found(api, one.requestBody)?.content;
  const parts = [
    make("h3", {}, make("span", { className: `method ${method}`, textContent: method.toUpperCase() }), code(path),
      one.security?.some((way) => "admin" in way) ? make("span", { className: "tag", textContent: "admin key" }) : null,
      one.security?.length === 0 ? make("span", { className: "tag", textContent: "no key" }) : null),
    prose(one.description ?? one.summary ?? ""),
  ];
  const given = (one.parameters ?? []).map((parameter) => found(api, parameter));
  if (given.length) {
    const schema = { properties: {}, required: given.filter((one) => one.required).map((one) => one.name) };
    for (const { name, schema: inner, description } of given) schema.properties[name] = { ...inner, description };
    parts.push(make("h4", { textContent: "Parameters" }), fieldsOf(api, schema));
  }
  for (const [type, { schema }] of Object.entries(body ?? {})) parts.push(make("h4", { textContent: `Body, ${type}` }), fieldsOf(api, schema));
  for (const [status, given] of Object.entries(one.responses)) {
    const answer = found(api, given);
    if (!/^2/.test(status)) continue;
    parts.push(make("h4", { textContent: `${status}: ${answer.description}` }));
    for (const { schema } of Object.values(answer.content ?? {})) if (schema) parts.push(fieldsOf(api, schema));
  }
  const errors = Object.entries(one.responses).filter(([status]) => /^[45]/.test(status));
  if (errors.length) {
    parts.push(make("h4", { textContent: "Errors" }));
    parts.push(make("p", { className: "quiet", textContent: errors.map(([status, given]) => `${status} ${found(api, given).description}`).join("; ") }));
  }
  parts.push(make("h4", { textContent: "Call" }), curl(api, method, path, body));
  return make("section", { className: "operation", id }, ...parts);
}

function draw(api) {
  const main = document.getElementById("operations");
  const contents = document.getElementById("contents");
  const intro = make("div", { className: "intro" }, ...api.info.description.split("\n\n").map((text) => prose(text)));
  main.replaceChildren(intro);
  for (const tag of api.tags) {
    main.append(make("h2", { textContent: tag.name }));
    contents.append(make("h2", { textContent: tag.name }));
    for (const [path, methods] of Object.entries(api.paths)) {
      for (const [method, one] of Object.entries(methods)) {
        if (!one.tags?.includes(tag.name)) continue;
        const id = one.operationId;
        main.append(operation(api, method, path, one, id));
        contents.append(make("a", { href: `#${id}` }, make("span", { className: `method ${method}`, textContent: method.toUpperCase() }), path));
      }
    }
  }
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

fetch("openapi.json").then((answer) => answer.json()).then(draw).catch((error) => {
  document.getElementById("operations").replaceChildren(make("p", { className: "problem", textContent: `the document cannot be read: ${error.message}` }));
});
