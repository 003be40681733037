"""A page in one file: figures inside it, nothing loaded from elsewhere, light or dark as the reader's system is."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fireq_jax.whole_files import write_whole

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --soft: #f3f5f7; --line: #d0d7de; --link: #0058a3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ec; --back: #14181c; --soft: #1f252b; --line: #3a434c; --link: #79b8ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem clamp(.75rem, 3vw, 2rem) 4rem; color: var(--text);
  background: var(--back); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
h1, h2, h3, p, dd, summary { overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; } nav a { color: var(--link); overflow-wrap: anywhere; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tbody tr:last-child td { border-bottom: 0; }
thead th { background: var(--soft); vertical-align: bottom; white-space: normal; min-width: 5rem; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--link); }
th button::after { content: " \\2195"; opacity: .45; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
figure { margin: 1rem 0; overflow-x: auto; background: #ffffff; border: 1px solid var(--line); border-radius: 6px; }
figure img { display: block; width: 100%; min-width: 44rem; height: auto; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; padding: 0 .75rem; }
summary { cursor: pointer; padding: .5rem 0; }
pre { background: var(--soft); padding: .75rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
"""

_SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending" ? -1 : 1;
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)], [m, n] = [parseFloat(x), parseFloat(y)];
      if (isNaN(m) !== isNaN(n)) return isNaN(m) ? 1 : -1;
      return down * (isNaN(m) ? x.localeCompare(y) : m - n);
    };
    [...body.rows].sort(compare).forEach(row => body.append(row));
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down < 0 ? "descending" : "ascending");
  }));
}
"""
Cell = str | tuple[str, float | None]


def write_page(path: Path, title: str, sections: Iterable[tuple[str, str]]) -> None:
    """Write a page, whole or not at all.

    Args:
        path: the file.
        title: of the page, plain text.
        sections: heading, plain text, and content, HTML, of each part.

    Raises:
        OSError: naming the file.
    """
    parts = list(sections)
    links = "".join(f'<a href="#part{i}">{html.escape(heading)}</a>' for i, (heading, _) in enumerate(parts))
    body = "".join(
        f'<h2 id="part{i}">{html.escape(heading)}</h2>{content}\n' for i, (heading, content) in enumerate(parts)
    )
    name = html.escape(title)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{name}</h1><nav>{links}</nav>\n{body}<script>{_SORT}</script></body></html>\n"
    )
    write_whole(path, lambda file: file.write(page.encode()))


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]], *, sortable: bool = False) -> str:
    """Rows of plain text, or of text and the number to sort by; None sorts last."""
    heads = (f"<button>{html.escape(name)}</button>" if sortable else html.escape(name) for name in header)
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def definitions(entries: Iterable[tuple[str, str]]) -> str:
    """Names and what they are, plain text."""
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in entries) + "</dl>"


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{html.escape(text)}</p>"


def code(text: str) -> str:
    """Lines as they are."""
    return f"<pre><code>{html.escape(text)}</code></pre>"


def details(summary: str, content: str) -> str:
    """HTML that is shown when its summary, plain text, is opened."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def picture(figure: Figure, description: str) -> str:
    """A figure, inside the page; browsers decode it when it is looked at."""
    stream = io.BytesIO()
    figure.savefig(stream, format="webp", pil_kwargs={"quality": 85})
    data = base64.b64encode(stream.getvalue()).decode()
    width, height = (round(size * figure.dpi) for size in figure.get_size_inches())
    return (
        f'<figure><img src="data:image/webp;base64,{data}" alt="{html.escape(description)}" width="{width}" '
        f'height="{height}" loading="lazy" decoding="async"></figure>'
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{html.escape(cell)}</td>"
    text, value = cell
    return f'<td data-value="{"" if value is None else value}">{html.escape(text)}</td>'
