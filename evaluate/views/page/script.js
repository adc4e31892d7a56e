// Texts of models reach the page through textContent only, never as markup.
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
    head.append(make('bdi', question.length > 160 ? `${question.slice(0, 160)}\u2026` : question));
    head.append(make('small', [row.id, row.category,
      ...row.answers.map((answer, i) => `${set.models[i]} ${answer.rouge_l.toFixed(1)}`)]
      .filter(Boolean).join(' \u00b7 ')));
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
