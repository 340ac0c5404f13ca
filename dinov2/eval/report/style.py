"""The style sheet of the page: light and dark, wide and narrow, screen and paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --card: #f6f7f9; --ink: #1c2024; --quiet: #5b636b; --edge: #d9dde2; --accent: #0b5cad;
  --bad: #b42318; --bad-ground: #fdeceb; --warn: #8a5300; --warn-ground: #fff4dc; --good: #176b3a;
  --c0: #0b62b8; --c1: #c2500a; --c2: #0f7b55; --c3: #9a3f93; --c4: #a37500; --c5: #5a6570;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171a; --card: #1d2125; --ink: #e6e9ec; --quiet: #a0a9b2; --edge: #363c43; --accent: #79b8ff;
    --bad: #ff8d84; --bad-ground: #3a1b19; --warn: #f0c062; --warn-ground: #352a12; --good: #6fcf97;
    --c0: #6db3ff; --c1: #ff9d5c; --c2: #5fd0a5; --c3: #e396dc; --c4: #e3bd4f; --c5: #aab4be;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body {
  margin: 0 auto; max-width: 1180px; padding: 1.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 {
  font-size: 1.3rem; line-height: 1.25; margin: 2.75rem 0 .5rem; padding-top: .9rem;
  border-top: 1px solid var(--edge);
}
h3 { font-size: 1.08rem; line-height: 1.3; margin: 1.6rem 0 .35rem; overflow-wrap: anywhere; }
h4 { font-size: 1rem; margin: 1.1rem 0 .35rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 75ch; }
a { color: var(--accent); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .87em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; }
.quiet { color: var(--quiet); }
.small { font-size: .88em; }
.path { overflow-wrap: anywhere; }
nav { margin: 1.25rem 0 0; font-size: .93rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; list-style: none; margin: 0; padding: 0; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 190px), 1fr)); gap: .75rem;
  margin: 1.1rem 0;
}
.tile { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: .7rem .9rem; }
.tile .label { color: var(--quiet); font-size: .84rem; }
.tile .value {
  font-size: 1.45rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere;
}
.tile.bad .value { color: var(--bad); }
.tile.warn .value { color: var(--warn); }
.tile.good .value { color: var(--good); }
.note {
  border-left: 4px solid var(--edge); background: var(--card); padding: .5rem .8rem;
  border-radius: 0 6px 6px 0; max-width: 80ch;
}
.note.bad { border-color: var(--bad); background: var(--bad-ground); }
.note.warn { border-color: var(--warn); background: var(--warn-ground); }
.note { margin: .6rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .92rem; }
th, td {
  text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid var(--edge);
}
thead th { font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td .range { display: block; color: var(--quiet); font-size: .88em; }
td.word { overflow-wrap: anywhere; min-width: 9rem; }
td.wide { min-width: 15rem; }
td.right { background: color-mix(in srgb, var(--good) 14%, transparent); }
td.wrong { background: color-mix(in srgb, var(--bad) 12%, transparent); }
.counts td, .counts th { padding-left: .6rem; border: 1px solid var(--edge); }
dl.facts { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .2rem 1.1rem; margin: .6rem 0; }
dl.facts dt { color: var(--quiet); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
details { border: 1px solid var(--edge); border-radius: 8px; padding: .1rem .9rem; margin: .7rem 0; }
details[open] { padding-bottom: .7rem; }
summary { cursor: pointer; padding: .5rem 0; font-weight: 600; overflow-wrap: anywhere; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1rem;
  margin: .9rem 0;
}
figure { margin: 0; break-inside: avoid; }
figure.chart {
  background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: .7rem .8rem .6rem;
}
figcaption { overflow-wrap: anywhere; }
figure.chart figcaption { font-weight: 600; font-size: .94rem; }
figure.chart > svg { display: block; width: 100%; height: auto; }
.legend {
  display: flex; flex-wrap: wrap; gap: .1rem .9rem; list-style: none; margin: .2rem 0 0; padding: 0;
  font-size: .84rem;
}
.swatch { width: 18px; height: 8px; margin-right: .35rem; vertical-align: middle; }
.broken { color: var(--bad); font-size: .84rem; }
svg .grid { stroke: var(--edge); stroke-width: 1; }
svg .mark { stroke: var(--bad); stroke-width: 1.2; stroke-dasharray: 2 3; }
svg .tick { fill: var(--quiet); font-size: 11px; }
svg .end { text-anchor: end; }
svg .mid { text-anchor: middle; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 5 3; }
svg .band { stroke: none; opacity: .22; }
svg .line.c0 { stroke: var(--c0); } svg .band.c0, svg .dot.c0 { fill: var(--c0); }
svg .line.c1 { stroke: var(--c1); } svg .band.c1, svg .dot.c1 { fill: var(--c1); }
svg .line.c2 { stroke: var(--c2); } svg .band.c2, svg .dot.c2 { fill: var(--c2); }
svg .line.c3 { stroke: var(--c3); } svg .band.c3, svg .dot.c3 { fill: var(--c3); }
svg .line.c4 { stroke: var(--c4); } svg .band.c4, svg .dot.c4 { fill: var(--c4); }
svg .line.c5 { stroke: var(--c5); } svg .band.c5, svg .dot.c5 { fill: var(--c5); }
svg.interval { display: block; width: 120px; height: 16px; }
svg.interval .axis { stroke: var(--edge); stroke-width: 2; }
svg.interval .whisker { stroke: var(--c0); stroke-width: 4; opacity: .5; }
svg.interval circle { fill: var(--c0); }
.photos {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 200px), 1fr)); gap: .9rem;
  margin: .8rem 0;
}
.photos figure { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: .6rem; }
.photos img { display: block; width: 100%; height: auto; max-height: 256px; object-fit: contain; border-radius: 4px; }
.photos .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; align-items: start; }
.photos figcaption { font-size: .84rem; margin-top: .4rem; }
.absent {
  display: grid; place-items: center; min-height: 120px; padding: .5rem; text-align: center; border-radius: 4px;
  border: 1px dashed var(--quiet); color: var(--quiet); font-size: .84rem; overflow-wrap: anywhere;
}
.picture { margin: 1rem 0; }
.picture img {
  display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--edge);
  border-radius: 6px;
}
@media (max-width: 560px) {
  body { padding: 1rem .9rem 3rem; }
  h1 { font-size: 1.4rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: .45rem; }
  .photos { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; }
  td.word { min-width: 7rem; }
  td.wide { min-width: 9rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media print {
  :root {
    --ground: #fff; --card: #fff; --ink: #000; --quiet: #444; --edge: #bbb; --accent: #000; --bad: #8f1a12;
    --c0: #0b62b8; --c1: #c2500a; --c2: #0f7b55; --c3: #9a3f93; --c4: #a37500; --c5: #5a6570;
  }
  body { max-width: none; padding: 0; font-size: 10pt; }
  table { font-size: 8pt; }
  th, td { padding-right: .5rem; }
  td.word, td.wide { min-width: 5rem; }
  td.number, td .range { white-space: normal; }
  svg.interval { width: 72px; height: auto; }
  nav { display: none; }
  .scroll { overflow: visible; }
  h2, h3, h4 { break-after: avoid; }
  tr, figure, .tile { break-inside: avoid; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
}
"""
