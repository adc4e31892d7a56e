"""Style and script of `report.html`: plain text that goes into the page, so that it needs no network and no build."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1c1c1c; --soft: #5a5a5a; --line: #d0d0d0; --card: #f5f5f3;
  --mark: #005a96; --grid: #dddddd; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --text: #e8e6e3; --soft: #a8a8a8; --line: #43474d;
  --card: #1f2226; --mark: #7cc4f5; --grid: #33373c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.2rem; border-top: 1px solid var(--line);
  padding-top: 1rem; } h3 { font-size: 1.05rem; }
p.note { color: var(--soft); max-width: 60rem; } p.warning { border-left: 4px solid #d55e00; padding-left: .8rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.best { font-weight: 700; color: var(--mark); }
small { color: var(--soft); font-weight: 400; }
figure { margin: 1rem 0; } figcaption { font-weight: 600; } svg { width: 100%; max-width: 52rem; height: auto; }
svg text { fill: var(--text); font: 13px system-ui, sans-serif; } svg .grid { stroke: var(--grid); }
svg .bar-end { stroke: var(--text); stroke-width: 1.5; fill: none; }
.s0 { fill: #0072b2; } .s1 { fill: #e69f00; } .s2 { fill: #009e73; } .s3 { fill: #d55e00; } .s4 { fill: #cc79a7; }
.s5 { fill: #56b4e9; } .s6 { fill: #999999; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; padding: 0; margin: .4rem 0; }
.legend svg { width: .9rem; height: .9rem; vertical-align: -1px; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; margin: .8rem 0; }
.controls label { display: flex; flex-direction: column; font-size: .85rem; color: var(--soft); }
select, input, button { font: inherit; padding: .35rem .5rem; color: var(--text); background: var(--back);
  border: 1px solid var(--line); border-radius: 4px; max-width: 100%; }
button:disabled { opacity: .5; } :focus-visible { outline: 3px solid var(--mark); outline-offset: 1px; }
.example { border: 1px solid var(--line); border-radius: 6px; margin: 0 0 1rem; padding: .7rem; }
.example h4 { margin: 0 0 .4rem; font-size: .9rem; color: var(--soft); font-weight: 400; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: .7rem; }
.part { background: var(--card); border-radius: 4px; padding: .5rem .7rem; min-width: 0; }
.part b { display: block; font-size: .85rem; } .part small { display: block; }
.part pre { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; max-height: 22rem;
  overflow-y: auto; }
"""

# Texts of models reach the page by textContent alone, never as markup.
SCRIPT = """
'use strict';
(() => {
  const data = JSON.parse(document.getElementById('examples').textContent);
  const find = id => document.getElementById(id);
  const perPage = 10;
  let page = 0;

  function make(tag, text, className) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  }
  function fill(select, entries) {
    select.replaceChildren();
    for (const [value, text] of entries) {
      const option = make('option', text);
      option.value = value;
      select.append(option);
    }
  }
  const current = () => data.sets[Number(find('set').value) || 0];

  function fillControls() {
    const set = current();
    fill(find('bucket'), [['', 'all lengths'], ...set.buckets.map(label => [label, label])]);
    const sorts = [['file', 'order of the file']];
    set.models.forEach((a, i) => {
      sorts.push([`high ${i}`, `${a}: best first`], [`low ${i}`, `${a}: worst first`]);
      set.models.forEach((b, j) => { if (i !== j) sorts.push([`gap ${i} ${j}`, `${a} ahead of ${b}`]); });
    });
    fill(find('sort'), sorts);
  }
  function chosen() {
    const wanted = find('search').value.trim().toLowerCase();
    const bucket = find('bucket').value;
    const rows = current().rows.filter(row =>
      (!bucket || row.answers.some(answer => answer.bucket === bucket)) &&
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
    node.append(make('b', title));
    if (detail) node.append(make('small', detail));
    node.append(make('pre', text));
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
    find('list').replaceChildren(...rows.slice(page * perPage, (page + 1) * perPage).map(row => {
      const node = make('article', undefined, 'example');
      node.append(make('h4', [row.id, row.category].filter(Boolean).join(' \\u00b7 ')));
      const grid = make('div', undefined, 'answers');
      grid.append(part('Prompt', '', row.prompt));
      row.references.forEach((text, i) =>
        grid.append(part(row.references.length > 1 ? `Reference ${i + 1}` : 'Reference', '', text)));
      row.answers.forEach((answer, i) => grid.append(part(set.models[i],
        `Rouge-L ${answer.rouge_l.toFixed(1)}, exact match ${answer.exact_match > 0 ? 'yes' : 'no'}, ` +
        `${answer.num_words} words, ${answer.bucket}${answer.unfinished ? ', unfinished' : ''}`, answer.text)));
      node.append(grid);
      return node;
    }));
  }
  function turn(by) { page += by; show(); find('browser').scrollIntoView(); }

  fill(find('set'), data.sets.map((set, i) => [String(i), set.name]));
  fillControls();
  find('set').addEventListener('change', () => { page = 0; fillControls(); show(); });
  for (const id of ['bucket', 'sort']) find(id).addEventListener('change', () => { page = 0; show(); });
  find('search').addEventListener('input', () => { page = 0; show(); });
  find('before').addEventListener('click', () => turn(-1));
  find('after').addEventListener('click', () => turn(1));
  document.addEventListener('keydown', event => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (['INPUT', 'SELECT', 'TEXTAREA'].includes(event.target.tagName)) return;
    if (event.key === '/') { event.preventDefault(); find('search').focus(); }
    if (event.key === 'j' && !find('after').disabled) turn(1);
    if (event.key === 'k' && !find('before').disabled) turn(-1);
  });
  show();
})();
"""
