"""A video with sound in a real Chromium: both streams are decoded to their end."""

from tests.io.test_sound import FPS, click, frames
from tinydiff.io.video import write_video

PLAYED = """
    const [done] = arguments, video = document.querySelector("video");
    video.muted = true;  // a page without a click may play no other
    const said = () => done([video.videoWidth, video.duration, video.webkitAudioDecodedByteCount > 0,
                             video.error && video.error.message]);
    video.addEventListener("ended", said);
    video.addEventListener("error", said);
    video.play();
"""


def test_a_video_with_sound_plays(browser, tmp_path):
    path, count = tmp_path / "a.mp4", 13
    write_video(path, frames(count), ".mp4", FPS, sound=click(1.0, 24000, 0.2))
    browser.get(path.as_uri())
    width, duration, heard, error = browser.execute_async_script(PLAYED)
    assert (width, heard, error) == (48, True, None) and abs(duration - count / FPS) < 1 / FPS
