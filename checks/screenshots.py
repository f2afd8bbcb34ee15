"""How a page looks: `python -m checks.screenshots out/tiny/report.html` writes pictures of it beside it.

As a wide window and a phone show it, each in light and dark, whole; and as it is printed. Headless Chromium is found on
the PATH, or by playwright where that is installed, and steered through its debugging pipe (the DevTools protocol: JSON
and a null byte). Says where a page is wider than its window.
"""
import base64
import fcntl
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from common import UserError, cli

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (1280, 390)
TALLEST = 8000  # pixels of a picture; a longer page gives several


def browser() -> str:
    """The path of a Chromium; UserError where there is none."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    try:
        from playwright.sync_api import sync_playwright
        with sync_playwright() as p:
            if Path(p.chromium.executable_path).is_file():
                return p.chromium.executable_path
    except ImportError:
        pass
    raise UserError(f"no Chromium on the PATH ({', '.join(NAMES)}) and none of playwright; install one, for example by "
                    "`apt-get install chromium` or `pip install playwright && playwright install chromium`")


def _pipe() -> list[int]:
    """Both ends under numbers that are not 3 and 4, where the browser looks for its own."""
    ends = os.pipe()
    found = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in ends]
    for fd in ends:
        os.close(fd)
    return found


class Chromium:
    """A headless browser with one page; ask(method, …) returns what the protocol answers."""

    def __init__(self, path: str, profile: str):
        (its_in, self.out), (self.inp, its_out) = _pipe(), _pipe()
        command = [path, "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars",
                   "--disable-gpu", "--no-first-run", *["--no-sandbox"] * (os.getuid() == 0)]
        silent = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        self.pid = os.posix_spawn(path, command, os.environ, file_actions=[
            (os.POSIX_SPAWN_DUP2, its_in, 3), (os.POSIX_SPAWN_DUP2, its_out, 4), *silent])
        os.close(its_in)
        os.close(its_out)
        self.rest, self.number, self.session = b"", 0, {}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def ask(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        return self.wait(lambda m: m.get("id") == self.number).get("result", {})

    def wait(self, wanted) -> dict:
        """The next message that is wanted; others are dropped."""
        while True:
            while b"\0" not in self.rest:
                piece = os.read(self.inp, 1 << 20)
                if not piece:
                    raise UserError("the browser ended; does it start by hand?")
                self.rest += piece
            text, _, self.rest = self.rest.partition(b"\0")
            message = json.loads(text)
            if "error" in message:
                raise UserError(f"the browser refused: {message['error']['message']}")
            if wanted(message):
                return message


def shoot(page: Path, chromium: Chromium) -> list[Path]:
    """Writes the pictures, and prints what does not fit; returns their paths."""
    found, ask = [], chromium.ask
    ask("Page.enable")
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
            ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            ask("Page.navigate", url=page.resolve().as_uri())
            chromium.wait(lambda m: m.get("method") == "Page.loadEventFired")
            size = ask("Page.getLayoutMetrics")["cssContentSize"]
            if size["width"] > width:
                print(f"too wide: {size['width']} pixels in a window of {width}")
            for part, top in enumerate(range(0, int(size["height"]), TALLEST), 1):
                clip = dict(x=0, y=top, width=width, height=min(TALLEST, size["height"] - top), scale=1)
                data = ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
                found.append(page.with_name(f"{page.stem}-{width}-{scheme}-{part}.png"))
                found[-1].write_bytes(base64.b64decode(data))
    ask("Emulation.setEmulatedMedia", features=[])
    found.append(page.with_suffix(".pdf"))
    found[-1].write_bytes(base64.b64decode(ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"]))
    return found


def main():
    page = Path(sys.argv[1]) if len(sys.argv) == 2 else Path()
    if not page.is_file():
        raise UserError("give one page: python -m checks.screenshots out/tiny/report.html (report.py makes it)")
    with tempfile.TemporaryDirectory() as profile:
        chromium = Chromium(browser(), profile)
        try:
            for path in shoot(page, chromium):
                print(path)
        finally:
            os.close(chromium.out)  # the browser ends when nobody can ask any more
            os.waitpid(chromium.pid, 0)


if __name__ == "__main__":
    cli(main)
