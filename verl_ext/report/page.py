"""One HTML file for any screen: plots inside, tables that sort and scroll, nothing loaded from elsewhere."""

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;margin:0;padding:1em;color:#222;background:#fff}
h1{font-size:1.6em}
h2{font-size:1.25em}
h1,h2,p{max-width:52em}
.table{overflow-x:auto;margin:1em 0}
table{border-collapse:collapse;font-size:.9em;font-variant-numeric:tabular-nums}
td,th{border:1px solid #ccc;padding:.3em .6em;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:#fff}
th{cursor:pointer;background:#f3f3f3;white-space:normal}
th:first-child{background:#f3f3f3}
th[aria-sort=ascending]::after{content:" \\2191"}
th[aria-sort=descending]::after{content:" \\2193"}
figure{margin:1em 0}
img{display:block;width:100%;max-height:94vh;object-fit:contain}
code,pre{background:#f3f3f3;overflow-wrap:anywhere}
pre{white-space:pre-wrap;padding:.5em;margin:.3em 0;max-height:60vh;overflow-y:auto}
details{border-top:1px solid #ccc;padding:.4em 0}
summary{cursor:pointer}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(22em,100%),1fr));gap:1em}
"""

# A click sorts by the numbers that cells begin with, or by texts if most do not; a second one the other way round.
SCRIPT = """
for (const table of document.querySelectorAll('table')) {
  const body = table.tBodies[0];
  const number = text => /^[+-]?[\\d.]/.test(text) ? parseFloat(text.replace(/,/g, '')) : NaN;
  const sort = (head, column) => {
    const up = head.getAttribute('aria-sort') === 'descending';
    const keyed = [...body.rows].map(row => [row.cells[column].textContent.trim(), row]);
    const numeric = keyed.filter(([text]) => !isNaN(number(text))).length * 2 > keyed.length;
    const isLast = text => numeric ? isNaN(number(text)) : text === '';
    keyed.sort(([a], [b]) => {
      if (isLast(a) || isLast(b)) return isLast(a) - isLast(b);
      const order = numeric ? number(a) - number(b) : a.localeCompare(b);
      return up ? order : -order;
    });
    for (const other of table.tHead.querySelectorAll('th')) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    body.append(...keyed.map(([, row]) => row));
  };
  if (body) [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.tabIndex = 0;
    head.title = 'sort';
    head.onclick = () => sort(head, column);
    head.onkeydown = event => { if (event.key === 'Enter') sort(head, column); };
  });
}
"""


def page(title: str, body: str) -> str:
    """Write a page around ``body``, which is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{body}<script>{SCRIPT}</script></body></html>\n"
    )


def to_html(text: str, folder: Path) -> str:
    """Render a report in Markdown as one HTML file, with the plots in ``folder`` inside."""
    # Names of runs and settings may look like HTML and must stay text.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)

    def embed(match: re.Match) -> str:
        data = base64.b64encode((folder / html.unescape(match[1])).read_bytes()).decode()
        return f'src="data:image/svg+xml;base64,{data}"'

    body = re.sub(r'src="([\w.]+\.svg)"', embed, body)
    body = re.sub(r"<p>(<img[^>]*>)</p>", r"<figure>\1</figure>", body)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    return page("Comparison of runs", body)
