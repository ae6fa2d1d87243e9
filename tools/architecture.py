"""Draws the rooms of bandpo from the imports of its source, and lists who imports whom.

    python tools/architecture.py           # writes docs/assets/architecture.svg and the list in docs/architecture.md
    python tools/architecture.py --check   # status 1 if either is out of date, or an import breaks a rule

A room is a module or a package directly below `bandpo`, `integrations.trl`, or `train.config`. Rooms stand on floors. A room
may import rooms of lower floors, and rooms of its own floor as long as no circle of imports arises. Only the standard library
is needed.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "bandpo"
PICTURE = ROOT / "docs" / "assets" / "architecture.svg"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- imports: begin, written by tools/architecture.py -->", "<!-- imports: end -->"

FLOORS: dict[str, dict[str, str]] = {
    "Commands": {"cli": "the command line"},
    "Applications": {
        "lab": "compare, experiments",
        "train": "bandpo train, evaluate",
        "doctor": "does the region act?",
        "train.config": "options of a run",
    },
    "Hosts": {"integrations.trl": "trainers for TRL", "integrations": "adapters for other hosts"},
    "Around the core": {
        "plots": "figures",
        "toy": "small tasks and models",
        "testing": "checks for your parts",
        "selection": "pruning, packing",
        "statistics": "intervals of paired runs",
        "monitoring": "metrics, their symptoms",
        "recipes": "files of whole runs",
    },
    "Front door": {"bandpo": "the public names"},
    "Core": {
        "losses": "policy_loss, aggregation",
        "zoo": "named objectives",
        "metrics": "what an update did",
        "terms": "one value for each token",
        "objective": "bounds x surrogate x …",
        "reference": "KL to a reference",
        "experimental": "may change at any time",
        "surrogates": "what the edge does",
        "projection": "onto a KL ball",
        "bounds": "which interval",
        "divergences": "f-divergences",
        "groups": "advantages",
        "preference": "learning from pairs",
        "logprobs": "token log-probs",
        "schedules": "radii that move",
        "_compiled": "policy_loss in one graph",
    },
    "Foundations": {
        "_inputs": "checks of arguments",
        "_eager": "fast without a compiler",
        "_values": "equality, pickles",
        "_deprecations": "old names",
        "_system": "files, locks, secrets",
        "configs": "configuration files",
    },
}
"""Floors from top to bottom, with their rooms and what each room is. An unlisted room is put where its imports allow."""

_PARTS_OF = {"": "bandpo", "_public": "bandpo", "__main__": "cli"}
_SPLIT = {
    "integrations.trl": "integrations.trl",
    "train.config": "train.config",
    "train.compute": "train.config",
    "train.wheels": "train.config",
    "train.gguf": "train.config",
}
"""Modules and packages that are rooms of their own, or parts of one, inside of a larger room."""
_LOWEST = list(FLOORS)[-1]

Graph = dict[str, set[str]]


def imports() -> Graph:
    """The rooms of the source, each with the rooms that it imports.

    An import may be at the top of a file, inside a function, or a string `"module:name"` such as the command line has.
    """
    modules = {_module(path): path for path in sorted(SOURCE.rglob("*.py"))}
    graph: Graph = {}
    for module, path in modules.items():
        room = _room(module)
        used = graph.setdefault(room, set())
        used.update(_room(target) for target in _targets(module, path, modules))
        used.discard(room)
    return graph


def floors(graph: Graph) -> dict[str, list[str]]:
    """The rooms of the source on their floors, from top to bottom.

    A room that `FLOORS` does not list is put where its imports allow.
    """
    order = list(FLOORS)
    placed = {title: [room for room in rooms if room in graph] for title, rooms in FLOORS.items()}
    floor_of = {room: i for i, rooms in enumerate(placed.values()) for room in rooms}
    for room in sorted(graph.keys() - floor_of):
        placed[order[min((floor_of.get(used, len(order) - 1) for used in graph[room]), default=-1)]].append(room)
    return {title: rooms for title, rooms in placed.items() if rooms}


def mistakes(graph: Graph) -> list[str]:
    """Imports that break a rule: a room that no floor lists, an arrow that points upward, and a circle."""
    level = {room: i for i, rooms in enumerate(floors(graph).values()) for room in rooms}
    listed = {room for rooms in FLOORS.values() for room in rooms}
    found = [
        f"no floor lists {room}; add it to FLOORS in tools/architecture.py" for room in sorted(graph.keys() - listed)
    ]
    found += [
        f"{room} imports {used}, which stands on a higher floor"
        for room in sorted(graph)
        for used in sorted(graph[room])
        if level[used] < level[room]
    ]
    return found + [
        f"{room} imports itself by way of other rooms" for room in sorted(graph) if room in _below(graph, room)
    ]


def listing(graph: Graph) -> str:
    """Who imports whom, as a Markdown table."""
    lines = ["| floor | room | imports |", "|---|---|---|"]
    for title, rooms in floors(graph).items():
        for room in rooms:
            used = ", ".join(f"`{name}`" for name in sorted(graph[room])) or "nothing of bandpo"
            lines.append(f"| {title} | `{room}` | {used} |")
    return "\n".join(lines)


def picture(graph: Graph) -> str:
    """The rooms on their floors, as an SVG with colours for light and dark pages.

    An arrow is left out where a chain of other arrows leads to the same room. Arrows to the foundations, which nearly all rooms
    use, are left out too.
    """
    rows = _rows(graph)
    arrows = _shortest(graph, {room for title, rooms in rows if title == _LOWEST for room in rooms})
    lanes, tracks = _lanes(rows, arrows)
    x = _columns(lanes, tracks)
    tops = [top for _, top, _ in _row_tops(rows)]
    y = {node: top + _TALL / 2 for lane, top in zip(lanes, tops, strict=True) for node in lane}
    about = {room: what for rooms in FLOORS.values() for room, what in rooms.items()}
    text = [_HEAD.format(width=_WIDTH, height=f"{tops[-1] + _TALL + 20:.0f}")]
    text += [_band(title, top, bottom) for title, top, bottom in _bands(rows)]
    text += [_arrow([(x[node], y[node]) for node in track]) for track in tracks]
    text += [_box(x[room], y[room], room, about.get(room, "")) for room in sorted(graph)]
    return "\n".join([*text, "</svg>", ""])


def page(graph: Graph, text: str) -> str:
    """The page with its list of imports brought up to date."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{listing(graph)}\n\n{END}{after}"


def _module(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(("bandpo", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _room(module: str) -> str:
    name = module.partition(".")[2]
    for part, room in _SPLIT.items():
        if name == part or name.startswith(f"{part}."):
            return room
    top = name.partition(".")[0]
    return _PARTS_OF.get(top, top)


def _targets(module: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join((*base, *filter(None, [node.module])))
            if source in modules:
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    if alias.name != "__version__":  # every room may read the version
                        yield inner if inner in modules else source
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # "bandpo.train.command:train"
            named = re.fullmatch(r"(bandpo(?:\.\w+)+):\w+", node.value)
            if named and named[1] in modules:
                yield named[1]


def _below(graph: Graph, room: str) -> set[str]:
    found: set[str] = set()
    pending = list(graph[room])
    while pending:
        if (name := pending.pop()) not in found:
            found.add(name)
            pending += graph[name]
    return found


# ---- the picture ----

_WIDTH, _LEFT, _MIDDLE = 960, 116.0, 530.0
_BOX, _TALL, _ROW = (150, 44), 44, 74
_BESIDE = 5
"""The most rooms in a row: six would be wider than the picture."""
_HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img"
  aria-label="The rooms of bandpo">
<style>
  text {{ font: 13px system-ui, sans-serif; fill: #1f2430 }}
  .name {{ font-weight: 600; font-size: 15px; text-anchor: middle }}
  .what {{ font-size: 11px; text-anchor: middle; fill: #525a6b }}
  .floor {{ font-size: 13px; fill: #6f7b95 }}
  .band {{ fill: #8892a6; fill-opacity: .1 }}
  .box {{ fill: #ffffff; stroke: #3b5bdb; stroke-width: 1.3 }}
  .arrow {{ fill: none; stroke: #6f7b95; stroke-width: 1.2 }}
  .tip {{ fill: #6f7b95 }}
  @media (prefers-color-scheme: dark) {{
    .name {{ fill: #e8eaf0 }}
    .what {{ fill: #aab2c4 }}
    .box {{ fill: #232838; stroke: #8ea2ff }}
  }}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path class="tip" d="M0 0 8 4 0 8z"/></marker></defs>"""


def _rows(graph: Graph) -> list[tuple[str, list[str]]]:
    """Rows of rooms, floor by floor: a room stands above those of its floor that it imports, but for the lowest floor.

    Rooms that find no place beside each other stand in several rows.
    """
    rows: list[tuple[str, list[str]]] = []
    for title, rooms in floors(graph).items():
        inside = frozenset() if title == _LOWEST else frozenset(rooms)
        depth = {room: _depth(graph, room, inside, frozenset()) for room in rooms}
        for level in range(max(depth.values()), -1, -1):
            beside = [room for room in rooms if depth[room] == level]
            count = -(-len(beside) // _BESIDE)
            rows += [(title, beside[i::count]) for i in range(count)]
    return rows


def _depth(graph: Graph, room: str, rooms: frozenset[str], seen: frozenset[str]) -> int:
    inside = (graph[room] & rooms) - seen - {room}
    return max((1 + _depth(graph, used, rooms, seen | {room}) for used in inside), default=0)


def _shortest(graph: Graph, foundations: set[str]) -> Graph:
    """The arrows that no chain of other arrows replaces, foundations left out."""
    inner = {room: used - foundations for room, used in graph.items() if room not in foundations}
    reached = {room: _below(inner, room) for room in inner}
    return {
        room: {a for a in used if not any(a in reached[b] for b in used if b != a and room not in reached[b])}
        for room, used in inner.items()
    }


def _lanes(rows: list[tuple[str, list[str]]], arrows: Graph) -> tuple[list[list[str]], list[list[str]]]:
    """The rows with a place for each arrow that passes through, and each arrow as the nodes that it runs along."""
    lanes = [list(rooms) for _, rooms in rows]
    row_of = {room: i for i, (_, rooms) in enumerate(rows) for room in rooms}
    tracks: list[list[str]] = []
    for room in sorted(arrows):
        for used in sorted(arrows[room]):
            first, last = row_of[room], row_of[used]
            between = [f"{room}>{used}:{i}" for i in range(first + 1, last)]
            for i, node in zip(range(first + 1, last), between, strict=True):
                lanes[i].append(node)
            tracks.append([room, *between, used])
    return lanes, tracks


def _columns(lanes: list[list[str]], tracks: list[list[str]]) -> dict[str, float]:
    """A horizontal place for each node: near the mean of its neighbours, and clear of the nodes beside it."""
    neighbours: dict[str, list[str]] = {node: [] for lane in lanes for node in lane}
    for track in tracks:
        for above, below in pairwise(track):
            neighbours[above].append(below)
            neighbours[below].append(above)
    x = {node: place for lane in lanes for node, place in zip(lane, _packed([_MIDDLE] * len(lane), lane), strict=True)}
    for sweep in range(40):
        for lane in lanes if sweep % 2 else lanes[::-1]:
            wanted = {node: _mean([x[n] for n in neighbours[node]], x[node]) for node in lane}
            lane.sort(key=lambda node: (wanted[node], node))
            x.update(zip(lane, _packed([wanted[node] for node in lane], lane), strict=True))
    return x


def _packed(wanted: list[float], lane: list[str]) -> list[float]:
    """Places in the order of the lane, as near to the wanted ones as the widths of the nodes allow."""
    half = [_BOX[0] / 2 + 8 if ">" not in node else 9.0 for node in lane]
    places = list(wanted)
    for _ in range(60):  # neighbours that overlap push each other apart by half of the overlap
        for i in range(len(places) - 1):
            overlap = places[i] + half[i] + half[i + 1] - places[i + 1]
            if overlap > 0:
                places[i], places[i + 1] = places[i] - overlap / 2, places[i + 1] + overlap / 2
    edge = _LEFT
    for i, place in enumerate(places):
        places[i] = max(place, edge + half[i])
        edge = places[i] + half[i]
    edge = _WIDTH - 6.0
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], edge - half[i])
        edge = places[i] - half[i]
    return places


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _row_tops(rows: list[tuple[str, list[str]]]) -> list[tuple[str, float, float]]:
    found: list[tuple[str, float, float]] = []
    top = 20.0
    for i, (title, _) in enumerate(rows):
        if i and title != rows[i - 1][0]:
            top += 18
        found.append((title, top, top + _TALL))
        top += _ROW
    return found


def _bands(rows: list[tuple[str, list[str]]]) -> list[tuple[str, float, float]]:
    bands: dict[str, tuple[float, float]] = {}
    for title, top, bottom in _row_tops(rows):
        bands[title] = (bands.get(title, (top, bottom))[0], bottom)
    return [(title, top - 12, bottom + 12) for title, (top, bottom) in bands.items()]


def _band(title: str, top: float, bottom: float) -> str:
    return (
        f'<rect class="band" x="4" y="{top:.0f}" width="{_WIDTH - 8}" height="{bottom - top:.0f}" rx="10"/>'
        f'<text class="floor" x="14" y="{(top + bottom) / 2 + 4:.0f}">{escape(title)}</text>'
    )


def _arrow(points: list[tuple[float, float]]) -> str:
    """A smooth line through the points, from the lower edge of the first box to the upper edge of the last."""
    (x1, y1), (x2, y2) = points[0], points[-1]
    reach = _BOX[0] / 2 - 20
    start = (x1 + max(-reach, min(reach, (points[1][0] - x1) / 4)), y1 + _TALL / 2)
    end = (x2 + max(-reach, min(reach, (points[-2][0] - x2) / 4)), y2 - _TALL / 2)
    path = f"M{start[0]:.0f} {start[1]:.0f}"
    here = start
    for place, (x, y) in enumerate(points[1:], 1):
        last = place == len(points) - 1
        there = end if last else (x, y - _TALL / 2)
        half = (there[1] - here[1]) / 2
        path += (
            f"C{here[0]:.0f} {here[1] + half:.0f} {there[0]:.0f} {there[1] - half:.0f} {there[0]:.0f} {there[1]:.0f}"
        )
        if not last:
            path += f"V{y + _TALL / 2:.0f}"
            here = (x, y + _TALL / 2)
    return f'<path class="arrow" marker-end="url(#tip)" d="{path}"/>'


def _box(x: float, y: float, room: str, what: str) -> str:
    wide, tall = _BOX
    return (
        f'<rect class="box" x="{x - wide / 2:.0f}" y="{y - tall / 2:.0f}" width="{wide}" height="{tall}" rx="7"/>'
        f'<text class="name" x="{x:.0f}" y="{y - 3:.0f}">{escape(room)}</text>'
        f'<text class="what" x="{x:.0f}" y="{y + 13:.0f}">{escape(what)}</text>'
    )


def main() -> int:
    """Writes picture and list, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if something is out of date")
    check = parser.parse_args().check
    graph = imports()
    wrong = mistakes(graph)
    for path, text in ((PICTURE, picture(graph)), (PAGE, page(graph, PAGE.read_text(encoding="utf-8")))):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            if check:
                wrong.append(f"{path.relative_to(ROOT)} is out of date; run python tools/architecture.py")
            else:
                path.write_text(text, encoding="utf-8")
    print(
        "\n".join(wrong) or f"{len(graph)} rooms, {sum(map(len, graph.values()))} imports between them, no rule broken"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
