"""Style, script and controls of `report.html`: plain text that goes into the page; no network, no build."""

from __future__ import annotations

# Colours keep the contrast of WCAG 2.1 AA in both modes: text 4.5 to 1, bars and curves 3 to 1 (a test computes it).
STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1c1c1c; --soft: #595959; --line: #8c8c8c; --card: #f3f3f1;
  --mark: #005a96; --grid: #dddddd; --warn: #c04d00; --s0: #0072b2; --s1: #b87900; --s2: #008a66; --s3: #c2402a;
  --s4: #b8578c; --s5: #2b8cc4; --s6: #7d7d7d; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --text: #e8e6e3; --soft: #b0b0b0; --line: #757a82;
  --card: #1f2226; --mark: #7cc4f5; --grid: #33373c; --warn: #ff9a57; --s0: #3a9bdc; --s1: #e69f00; --s2: #2bb38a;
  --s3: #f07561; --s4: #d58bb0; --s5: #7cc9f2; --s6: #a8a8a8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .9rem; } a { color: var(--mark); }
h1 { font-size: 1.6rem; margin: .6rem 0; } h2 { font-size: 1.3rem; margin-top: 2.2rem; padding-top: 1rem;
  border-top: 1px solid var(--grid); }
p.note { color: var(--soft); max-width: 60rem; }
p.warning { border-left: 4px solid var(--warn); padding-left: .8rem; max-width: 60rem; }
.scroll { overflow-x: auto; margin: 1rem 0; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(60rem, calc(100vw - 2rem)); }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap;
  vertical-align: top; }
thead th { border-bottom-color: var(--line); vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; }
th[scope="row"] { white-space: normal; min-width: 7rem; max-width: 24rem; font-weight: 600; }
td.best { font-weight: 700; color: var(--mark); }
small { color: var(--soft); font-weight: 400; } td small { display: block; }
figure { margin: 1.6rem 0; max-width: 42rem; } figcaption { font-weight: 600; } figure .scroll { margin: .3rem 0; }
svg { display: block; width: 100%; height: auto; } figure .scroll svg { min-width: 30rem; }
svg text { fill: var(--text); font: 13px system-ui, sans-serif; } svg .axis { fill: var(--soft); }
svg .grid { stroke: var(--grid); } svg .bar-end { stroke: var(--text); stroke-width: 1.5; fill: none; }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .dotted { stroke-dasharray: 2 4; }
@media (max-width: 40rem) { th[scope="row"] { max-width: 9rem; } }
.s0 { fill: var(--s0); } .s1 { fill: var(--s1); } .s2 { fill: var(--s2); } .s3 { fill: var(--s3); }
.s4 { fill: var(--s4); } .s5 { fill: var(--s5); } .s6 { fill: var(--s6); }
.c0 { stroke: var(--s0); } .c1 { stroke: var(--s1); } .c2 { stroke: var(--s2); } .c3 { stroke: var(--s3); }
.c4 { stroke: var(--s4); } .c5 { stroke: var(--s5); } .c6 { stroke: var(--s6); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; padding: 0; margin: .4rem 0; }
.legend svg { display: inline-block; width: .9rem; height: .9rem; vertical-align: -1px; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; margin: .8rem 0; }
.controls label { display: flex; flex-direction: column; font-size: .85rem; color: var(--soft); min-width: 0;
  max-width: 100%; }
select, input, button { font: inherit; padding: .35rem .5rem; color: var(--text); background: var(--back);
  border: 1px solid var(--line); border-radius: 4px; max-width: 100%; }
button:disabled { color: var(--soft); border-style: dashed; }
:focus-visible { outline: 3px solid var(--mark); outline-offset: 1px; }
.example { border: 1px solid var(--grid); border-radius: 6px; margin: 0 0 .6rem; }
.example summary { padding: .5rem .7rem; cursor: pointer; border-radius: 6px; }
.example summary small, .part small { display: block; }
.example[open] summary { border-bottom: 1px solid var(--grid); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: .7rem;
  padding: .7rem; }
.part { background: var(--card); border-radius: 4px; padding: .5rem .7rem; min-width: 0; }
.part h3 { margin: 0; font-size: .9rem; }
.part pre { margin: .3rem 0 0; white-space: pre-wrap; font: inherit; max-height: 22rem; overflow-y: auto; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0; } code { font-size: .88em; }
"""

BROWSER = """<section id="browser"><h2>Examples</h2>
<p class="note">Each model's answers with its first seed. Keys: / searches, j and k go through the examples, Enter opens
one.</p><noscript><p>The browser of examples needs JavaScript; per_example.parquet has the same rows.</p></noscript>
<div class="controls"><label>Data set <select id="set"></select></label>
<label>Sort by Rouge-L <select id="sort"></select></label>
<label>Length <select id="bucket"></select></label><label>Category <select id="category"></select></label>
<label>Search <input id="search" type="search"></label>
<button id="before" type="button">Previous</button><button id="after" type="button">Next</button>
<span id="place" role="status" aria-live="polite"></span></div><div id="list"></div></section>"""

# Texts of models reach the page by textContent alone, never as markup.
SCRIPT = """
'use strict';
(() => {
  const data = JSON.parse(document.getElementById('examples').textContent);
  const find = id => document.getElementById(id);
  const perPage = 20;
  let page = 0;

  function make(tag, text, className) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  }
  function option(value, text) {
    const node = make('option', text);
    node.value = value;
    return node;
  }
  function group(label, options) {
    const node = make('optgroup');
    node.label = label;
    node.append(...options);
    return node;
  }
  const current = () => data.sets[Number(find('set').value) || 0];

  function fillControls() {
    const { models, buckets, rows } = current();
    const categories = [...new Set(rows.map(row => row.category).filter(Boolean))].sort();
    find('bucket').replaceChildren(option('', 'all lengths'), ...buckets.map(label => option(label, label)));
    find('category').replaceChildren(option('', 'all categories'), ...categories.map(name => option(name, name)));
    find('category').disabled = categories.length === 0;
    const sorts = [option('file', 'order of the file'), group('one model', models.flatMap((name, i) =>
      [option(`high ${i}`, `${name}: best first`), option(`low ${i}`, `${name}: worst first`)]))];
    const pairs = models.flatMap((a, i) => models.flatMap((b, j) => i === j ? [] :
      [option(`gap ${i} ${j}`, `${a} ahead of ${b}`)]));
    if (pairs.length) sorts.push(group('difference of two', pairs));
    find('sort').replaceChildren(...sorts);
  }
  function chosen() {
    const wanted = find('search').value.trim().toLowerCase();
    const bucket = find('bucket').value, category = find('category').value;
    const rows = current().rows.filter(row =>
      (!bucket || row.answers.some(answer => answer.bucket === bucket)) &&
      (!category || row.category === category) &&
      (!wanted || [row.id, row.category, row.prompt, ...row.references, ...row.answers.map(a => a.text)]
        .some(text => text.toLowerCase().includes(wanted))));
    const [kind, i, j] = find('sort').value.split(' ');
    const score = {
      high: row => row.answers[i].rouge_l,
      low: row => -row.answers[i].rouge_l,
      gap: row => row.answers[i].rouge_l - row.answers[j].rouge_l,
    }[kind];
    return score ? rows.map(row => [score(row), row]).sort((a, b) => b[0] - a[0]).map(pair => pair[1]) : rows;
  }
  function part(title, detail, text) {
    const node = make('div', undefined, 'part');
    node.append(make('h3', title));
    if (detail) node.append(make('small', detail));
    const content = make('pre', text);
    content.dir = 'auto';
    node.append(content);
    return node;
  }
  function parts(set, row) {
    const grid = make('div', undefined, 'answers');
    grid.append(part('Prompt', '', row.prompt));
    row.references.forEach((text, i) =>
      grid.append(part(row.references.length > 1 ? `Reference ${i + 1}` : 'Reference', '', text)));
    row.answers.forEach((answer, i) => grid.append(part(set.models[i],
      `Rouge-L ${answer.rouge_l.toFixed(1)}, exact match ${answer.exact_match > 0 ? 'yes' : 'no'}, ` +
      `${answer.num_words} words, ${answer.bucket}${answer.unfinished ? ', unfinished' : ''}`, answer.text)));
    return grid;
  }
  function example(set, row) {
    const node = make('details', undefined, 'example');
    const head = make('summary');
    const question = row.question.trim();
    head.append(make('bdi', question.length > 160 ? `${question.slice(0, 160)}\\u2026` : question));
    head.append(make('small', [row.id, row.category,
      ...row.answers.map((answer, i) => `${set.models[i]} ${answer.rouge_l.toFixed(1)}`)]
      .filter(Boolean).join(' \\u00b7 ')));
    node.append(head);
    // made when it is first opened: a page of long answers would be slow otherwise
    node.addEventListener('toggle', () => { if (node.children.length === 1) node.append(parts(set, row)); });
    return node;
  }
  function show() {
    const set = current();
    const rows = chosen();
    const pages = Math.max(1, Math.ceil(rows.length / perPage));
    page = Math.min(Math.max(page, 0), pages - 1);
    find('place').textContent = `${rows.length} of ${set.rows.length} rows, page ${page + 1} of ${pages}`;
    find('before').disabled = page === 0;
    find('after').disabled = page === pages - 1;
    find('list').replaceChildren(...rows.slice(page * perPage, (page + 1) * perPage).map(row => example(set, row)));
  }
  function turn(by) { page += by; show(); find('browser').scrollIntoView(); }
  function go(by) {
    const heads = [...document.querySelectorAll('#list summary')];
    const place = heads.indexOf(document.activeElement) + by;
    if (heads[place]) return heads[place].focus();
    if (place >= heads.length && !find('after').disabled) { turn(1); document.querySelector('#list summary').focus(); }
    else if (heads.length && place === -1 && !find('before').disabled) {
      turn(-1);
      [...document.querySelectorAll('#list summary')].at(-1).focus();
    }
  }

  find('set').replaceChildren(...data.sets.map((set, i) => option(String(i), set.name)));
  fillControls();
  find('set').addEventListener('change', () => { page = 0; fillControls(); show(); });
  for (const id of ['bucket', 'category', 'sort']) find(id).addEventListener('change', () => { page = 0; show(); });
  find('search').addEventListener('input', () => { page = 0; show(); });
  find('before').addEventListener('click', () => turn(-1));
  find('after').addEventListener('click', () => turn(1));
  document.addEventListener('keydown', event => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === 'Escape' && event.target === find('search')) { find('search').blur(); return; }
    if (['INPUT', 'SELECT', 'TEXTAREA'].includes(event.target.tagName)) return;
    if (event.key === '/') { event.preventDefault(); find('search').focus(); }
    if (event.key === 'j') go(1);
    if (event.key === 'k') go(-1);
  });
  show();
})();
"""
