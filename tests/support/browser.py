"""A page -> what a real browser makes of it: its width, its contrasts, what it loads and complains of.

Scripts in the page do not run.

One start of Chromium shows the page in frames, wide and narrow, light and dark, and a script beside them measures.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HARNESS = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,"><body>FRAMES<pre id="found"></pre>
<script>
function rgb(text) { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n }
function luminance(c) {
  const [r, g, b] = c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  return .2126 * r + .7152 * g + .0722 * b
}
function ground(window, element) {
  for (let e = element; e; e = e.parentElement) {
    const c = rgb(window.getComputedStyle(e).backgroundColor)
    if (c[3] == 1) return c.slice(0, 3)
  }
  return [255, 255, 255]
}
function contrasts(window) {
  const found = []
  for (const e of window.document.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()) || e.tagName == "title") continue
    const style = window.getComputedStyle(e), text = rgb(e.closest("svg") ? style.fill : style.color).slice(0, 3)
    const [a, b] = [luminance(text), luminance(ground(window, e))].sort((x, y) => y - x)
    found.push([(a + .05) / (b + .05), e.textContent.trim().slice(0, 40)])
  }
  return found.sort((x, y) => x[0] - y[0])
}
function measure(frame) {
  const w = frame.contentWindow, d = w.document, texts = [...d.querySelectorAll("svg.chart text")]
  const outside = texts.filter(t => { const a = t.getBoundingClientRect(), b = t.closest("svg").getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1 })
  const all = contrasts(w)
  return {frame: frame.id, width: w.innerWidth, scroll: d.documentElement.scrollWidth,
    dark: w.matchMedia("(prefers-color-scheme: dark)").matches, texts: all.length, worst: all[0],
    smallest: Math.min(...texts.map(t => t.getBoundingClientRect().height)), outside: outside.map(t => t.textContent),
    loaded: w.performance.getEntriesByType("resource").map(r => r.name)}
}
addEventListener("load", () => {
  document.getElementById("found").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(measure))
})
</script>"""


def look(page: str, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What each of four frames measured, and what the browser said on its console. Skips where there is no Chromium."""
    program = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
    if program is None:
        pytest.skip("no chromium on PATH: the page was not looked at in a browser")
    frames = "".join(
        f'<iframe id="{scheme}-{width}" width="{width}" height="900" style="color-scheme: {scheme}; border: 0" '
        f'srcdoc="{html.escape(page)}"></iframe>'
        for scheme in ("light", "dark")
        for width in (1280, 390)
    )
    harness = folder / "harness.html"
    harness.write_text(HARNESS.replace("FRAMES", frames), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --enable-logging=stderr"
    done = subprocess.run(
        [program, *flags.split(), f"--user-data-dir={folder / 'profile'}", "--dump-dom", harness.as_uri()],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]
