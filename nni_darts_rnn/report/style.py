"""The frame of the report's page and its style sheet. `page.render` fills in `{title}`, `{body}` and `{foot}`."""

CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1d2129; --soft: #5a626e; --line: #dfe3e8; --accent: #0067a5;
  --wash: #e8f1f8; --bad: #a8380b; --good: #0a6b4f; --code: #f0f2f5; }
@media (prefers-color-scheme: dark) { :root { --page: #12151a; --card: #1b1f26; --ink: #e7eaee; --soft: #a2abb8; --line: #313843;
  --accent: #7cc0f0; --wash: #1d2f3d; --bad: #f0a07a; --good: #6fcfae; --code: #242a33; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, footer { max-width: 1040px; margin: 0 auto; padding: 0 16px; }
header { padding: 32px 0 8px; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.2rem); line-height: 1.2; margin: 0 0 16px;
  letter-spacing: -.01em; text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 12px; line-height: 1.3; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 18px 0 8px; }
.eyebrow { margin: 0 0 4px; color: var(--accent); font-size: .8rem; font-weight: 600; letter-spacing: .06em; text-transform: uppercase; }
a { color: var(--accent); }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px; margin: 16px 0; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 28px; margin: 0 0 8px; }
.facts dt { color: var(--soft); font-size: .78rem; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 8px 36px; margin: 0 0 8px; }
.figures span { color: var(--soft); font-size: .85rem; }
.figures b { display: block; color: var(--ink); font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.15;
  font-weight: 650; font-variant-numeric: tabular-nums; }
.figures span:first-child b { color: var(--accent); }
.small { color: var(--soft); font-size: .875rem; margin: 10px 0 0; }
li .small { margin: 0; }
figure { margin: 8px 0; overflow-x: auto; }
figure svg { display: block; width: var(--w); max-width: 100%; height: auto; margin: 0 auto; }
svg image { image-rendering: pixelated; }
.alpha svg { margin: 0; min-width: 560px; }
.curves svg { margin: -16px 0 0; }
@media (max-width: 600px) { .curves svg { min-width: 560px; } #compared ~ .curves svg { min-width: 0; }
  section { padding: 16px 14px; border-radius: 10px; } }
@media (prefers-color-scheme: dark) { figure svg { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 10px; border-bottom: 1px solid var(--line); vertical-align: top; font-weight: 400; }
thead th { color: var(--soft); font-size: .78rem; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
.n { text-align: right; white-space: nowrap; }
thead + tbody tr:first-child { background: var(--wash); font-weight: 600; }
thead + tbody tr:first-child > * { font-weight: 600; }
.ranking th:first-child, .ranking td:first-child { width: 1%; }
table.recipe { font-size: .875rem; }
table.recipe th, table.recipe td { padding: 4px 10px; }
tr.changed { background: var(--wash); }
tr.changed td.n { font-weight: 650; }
.rank { display: inline-block; min-width: 1.7em; padding: 0 .4em; margin-right: 4px; border-radius: 999px; background: var(--wash);
  color: var(--accent); text-align: center; }
.genotype { margin: 8px 0; }
code { font: .875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { background: var(--code); border-radius: 8px; padding: 12px 14px; margin: 8px 0; overflow-x: auto; }
pre code { overflow-wrap: normal; }
details { border-top: 1px solid var(--line); }
summary { cursor: pointer; padding: 10px 0; font-weight: 600; }
.missing { color: var(--soft); }
.unfinished { list-style: none; margin: 0; padding: 0; }
.unfinished li { padding: 10px 0; border-bottom: 1px solid var(--line); }
.unfinished li:last-child { border-bottom: 0; }
.state { font-size: .8rem; padding: 1px 8px; border-radius: 999px; border: 1px solid currentColor; color: var(--soft); }
.state.failed { color: var(--bad); }
.state.running { color: var(--good); }
.note { color: var(--bad); }
footer { color: var(--soft); font-size: .8rem; padding-bottom: 32px; overflow-wrap: anywhere; }
@media (max-width: 600px) { .wide { display: none; } th, td { padding: 8px 6px; } }
@media print { section { break-inside: avoid; border-color: #ccc; } figure svg { filter: none; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>""" + CSS.replace("{", "{{").replace("}", "}}") + """</style>
</head>
<body>
<main>
{body}
</main>
<footer>{foot}</footer>
</body>
</html>
"""
