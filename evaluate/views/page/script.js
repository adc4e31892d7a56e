// The workbench of examples. Texts of models reach the page through text nodes only, never as markup.
'use strict';
(async () => {
  const find = id => document.getElementById(id);
  const letters = atob(find('examples').textContent), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  const data = await new Response(unpacked).json();
  const TEXT = 0, SCORE = 1, EXACT = 2, WORDS = 3, BUCKET = 4, CUT = 5, READ = 6, REPLY = 7;  // of an answer
  const PER_PAGE = 25, SHOWN = 20000, MOST_CELLS = 2e7;
  const CONTROLS = ['set', 'model', 'other', 'seed', 'outcome', 'bucket', 'category', 'from', 'to', 'search', 'sort'];
  let rows = [], page = 0, chosen = null;

  function make(tag, text, className) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  }
  const SPACE = document.querySelector('svg').namespaceURI;
  function draw(parent, tag, attributes, text) {
    const node = document.createElementNS(SPACE, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }
  const set = () => data.sets[Number(find('set').value) || 0];
  const model = () => Number(find('model').value);
  const other = () => find('other').value === '' ? null : Number(find('other').value);
  function answerOf(row, index) {
    const seeds = row.answers[index];
    return seeds[Math.min(Number(find('seed').value) || 0, seeds.length - 1)];
  }

  // Controls, and the address: everything that is not as it was at first is in the part after the #.
  function fill(id, options) {
    find(id).replaceChildren(...options.map(([value, text]) => {
      const node = make('option', text);
      node.value = value;
      return node;
    }));
    find(id).disabled = options.length < 2;
  }
  function fillControls() {
    const { models, order, seeds, buckets, rows: all } = set();
    const { teacher, baseline } = data.roles;
    const named = order.map(index => [String(index), models[index]]);
    const first = order.find(index => models[index] !== teacher && models[index] !== baseline) ?? order[0];
    const second = [models.indexOf(baseline), ...order].find(index => index >= 0 && index !== first);
    fill('model', named);
    fill('other', models.length > 1 ? named : [['', 'none']]);
    find('model').value = String(first);
    find('other').value = second === undefined ? '' : String(second);
    const longest = seeds.reduce((a, b) => b.length > a.length ? b : a);
    fill('seed', longest.map((seed, index) => [String(index), String(seed)]));
    fill('outcome', [['', 'all'], ...(models.length > 1 ? [['won', 'won'], ['tied', 'tied'], ['lost', 'lost']] : [])]);
    fill('bucket', [['', 'all'], ...buckets.map((label, index) => [String(index), label])]);
    const categories = [...new Set(all.map(row => row.category).filter(Boolean))].sort();
    fill('category', [['', 'all'], ...categories.map(name => [name, name])]);
    fill('sort', [['', 'as in the file'], ['gain', 'largest gain'], ['loss', 'largest loss'],
      ['high', 'highest score'], ['low', 'lowest score']]);
    for (const id of ['from', 'to', 'search']) find(id).value = '';
    find('cut').textContent = set().note;
    for (const id of CONTROLS) defaults[id] = find(id).value;
  }
  const defaults = {};
  function address(row) {
    const parts = new URLSearchParams();
    for (const id of CONTROLS) {
      const value = find(id).value;
      if (value === defaults[id]) continue;
      if (id === 'model' || id === 'other') parts.set(id, set().models[Number(value)]);
      else parts.set(id, id === 'set' ? set().name : value);
    }
    if (!find('keys').checked) parts.set('keys', 'off');
    if (row) parts.set('row', row.id);
    return `#${parts}`;
  }
  function readAddress() {
    const parts = new URLSearchParams(location.hash.slice(1));
    find('set').value = String(Math.max(0, data.sets.findIndex(found => found.name === parts.get('set'))));
    fillControls();
    defaults.set = '0';
    for (const id of CONTROLS.slice(1)) {
      if (!parts.has(id)) continue;
      const value = parts.get(id), index = set().models.indexOf(value);
      find(id).value = id === 'model' || id === 'other' ? String(index) : value;
      if (find(id).value === '' && defaults[id] !== '') find(id).value = defaults[id];  // a name that is not here
    }
    find('keys').checked = parts.get('keys') !== 'off';
    chosen = set().rows.find(row => row.id === parts.get('row')) ?? null;
    page = 0;
  }
  const keepAddress = () => history.replaceState(null, '', address(chosen));

  // Which rows, in which order.
  function outcome(row) {
    if (other() === null) return '';
    const gap = answerOf(row, model())[SCORE] - answerOf(row, other())[SCORE];
    return gap > 0 ? 'won' : gap < 0 ? 'lost' : 'tied';
  }
  function choose() {
    const wanted = find('search').value.trim().toLowerCase();
    const [from, to] = ['from', 'to'].map(id => find(id).value === '' ? null : Number(find(id).value));
    const only = { outcome: find('outcome').value, bucket: find('bucket').value, category: find('category').value };
    rows = set().rows.filter(row => {
      const answer = answerOf(row, model());
      return (!only.outcome || outcome(row) === only.outcome) && (!only.category || row.category === only.category) &&
        (only.bucket === '' || answer[BUCKET] === Number(only.bucket)) &&
        (from === null || answer[SCORE] >= from) && (to === null || answer[SCORE] <= to) &&
        (!wanted || [row.id, row.category, ...row.messages.map(turn => turn[1]), ...row.references,
          ...row.answers.map((_, index) => answerOf(row, index)[TEXT])]
          .some(text => text.toLowerCase().includes(wanted)));
    });
    const own = row => answerOf(row, model())[SCORE];
    const gap = row => own(row) - (other() === null ? 0 : answerOf(row, other())[SCORE]);
    const key = { high: row => -own(row), low: own, gain: row => -gap(row), loss: gap }[find('sort').value];
    if (key) rows = rows.map(row => [key(row), row]).sort((a, b) => a[0] - b[0]).map(pair => pair[1]);
  }

  // A dot a row: the model's score against the other's (or against its words, without another).
  function showScatter() {
    const points = rows.map(row => {
      const answer = answerOf(row, model());
      return [other() === null ? answer[WORDS] : answerOf(row, other())[SCORE], answer[SCORE], row];
    });
    const top = axis => Math.max(10, Math.ceil(Math.max(...points.map(point => point[axis]), 0) / 10) * 10);
    const ends = other() === null ? [top(0), top(1)] : [Math.max(top(0), top(1)), Math.max(top(0), top(1))];
    const x = value => 34 + 256 * value / ends[0], y = value => 262 - 252 * value / ends[1];
    const names = set().models.map(name => name.length > 24 ? `${name.slice(0, 12)}\u2026${name.slice(-11)}` : name);
    const below = other() === null ? 'words of the answer' : `Rouge-L of ${names[other()]}`;
    find('axes').textContent = `Rouge-L of ${names[model()]}, by ${below}`;
    const svg = document.createElementNS(SPACE, 'svg');
    svg.setAttribute('viewBox', '0 0 300 300');
    svg.setAttribute('role', 'img');
    svg.setAttribute('aria-label', `${rows.length} rows; the list beside it has the same rows`);
    for (const part of [0, .5, 1]) {
      draw(svg, 'text', { x: x(ends[0] * part), y: 278, 'text-anchor': 'middle' }, String(ends[0] * part));
      draw(svg, 'text', { x: 28, y: y(ends[1] * part) + 4, 'text-anchor': 'end' }, String(ends[1] * part));
      draw(svg, 'path', { class: 'grid', d: `M34 ${y(ends[1] * part)}H290M${x(ends[0] * part)} 10V262` });
    }
    if (other() !== null) draw(svg, 'path', { class: 'even', d: `M${x(0)} ${y(0)}L${x(ends[0])} ${y(ends[1])}` });
    draw(svg, 'text', { class: 'axis', x: 162, y: 296, 'text-anchor': 'middle' }, below);
    const colour = set().colours[model()];
    for (const [a, b, row] of points) {
      const dot = draw(svg, 'circle', { class: `s${colour}${row === chosen ? ' chosen' : ''}`, r: 4, cx: x(a), cy: y(b) });
      dot.row = row;
    }
    svg.append(...svg.querySelectorAll('.chosen'));  // on top of the others
    svg.addEventListener('click', event => { if (event.target.row) show(event.target.row); });
    find('scatter').replaceChildren(svg);
  }
  function showList() {
    const pages = Math.max(1, Math.ceil(rows.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    find('place').textContent = `${rows.length} of ${set().rows.length} rows, page ${page + 1} of ${pages}`;
    find('before').disabled = page === 0;
    find('after').disabled = page === pages - 1;
    find('list').replaceChildren(...rows.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(row => {
      const item = make('li'), button = make('button');
      const asked = row.messages[row.messages.length - 1][1].trim();
      const scores = [model(), other()].filter(index => index !== null)
        .map(index => `${set().models[index]} ${answerOf(row, index)[SCORE].toFixed(1)}`);
      button.type = 'button';
      button.row = row;
      button.setAttribute('aria-current', String(row === chosen));
      button.append(make('bdi', asked.length > 110 ? `${asked.slice(0, 110)}\u2026` : asked),
        make('small', [row.id, row.category, ...scores].filter(Boolean).join(' \u00b7 ')));
      button.addEventListener('click', () => show(row));
      item.append(button);
      return item;
    }));
  }

  // What Rouge-L counts: the longest common subsequence of the tokens of an answer and a reference.
  function tokensOf(text) {
    const lower = [...text].map(letter => letter.toLowerCase());
    const starts = [];
    let place = 0;
    [...text].forEach((letter, index) => {
      for (let i = 0; i < lower[index].length; i++) starts.push(place);
      place += letter.length;
    });
    starts.push(place);
    const pattern = { default: /[a-z0-9]+/g, whitespace: /\S+/g, character: /\S/gu }[data.tokenizer];
    return [...lower.join('').matchAll(pattern)].map(found => ({
      token: Object.hasOwn(set().stems, found[0]) ? set().stems[found[0]] : found[0],
      start: starts[found.index], end: starts[found.index + found[0].length],
    }));
  }
  function common(answer, reference) {
    const [a, b] = [tokensOf(answer), tokensOf(reference)], width = b.length + 1;
    const found = { answer: [], reference: [], numAnswer: a.length, numReference: b.length };
    if (a.length * b.length > MOST_CELLS) return null;
    const table = new Uint16Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        const at = i * width + j;
        table[at] = a[i].token === b[j].token ? table[at + width + 1] + 1 : Math.max(table[at + width], table[at + 1]);
      }
    }
    for (let i = 0, j = 0; i < a.length && j < b.length;) {
      if (a[i].token === b[j].token) { found.answer.push(a[i++]); found.reference.push(b[j++]); }
      else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i++;
      else j++;
    }
    return found;
  }
  function best(answer, references) {
    const all = references.map(reference => common(answer, reference));
    const score = found => found && found.numAnswer + found.numReference
      ? 2 * found.answer.length / (found.numAnswer + found.numReference) : 0;
    const index = all.reduce((top, found, i) => score(found) > score(all[top]) ? i : top, 0);
    return { index, found: all[index] };
  }
  function fillText(pre, text, marks) {
    let shown = 0, next = 0;
    const button = make('button');
    button.type = 'button';
    function more() {
      const end = Math.min(text.length, shown + SHOWN);
      while (shown < end) {
        const mark = marks[next];
        if (!mark || mark.start >= end) { pre.append(text.slice(shown, end)); shown = end; break; }
        if (mark.start > shown) pre.append(text.slice(shown, mark.start));
        pre.append(make('mark', text.slice(mark.start, mark.end)));
        shown = mark.end;
        next++;
      }
      const left = text.length - shown;
      button.textContent = `Show ${Math.min(left, SHOWN).toLocaleString('en')} more of ${left.toLocaleString('en')} characters`;
      button.hidden = left <= 0;
    }
    more();
    button.addEventListener('click', more);
    return button;
  }
  function block(title, detail, text, marks = []) {
    const node = make('div', undefined, 'text'), pre = make('pre');
    pre.dir = 'auto';
    pre.tabIndex = 0;
    node.append(make('h3', title));
    if (detail) node.append(make('small', detail));
    const button = fillText(pre, text, marks);
    node.append(pre, button);
    return node;
  }
  function answerBlock(row, index, match) {
    const answer = answerOf(row, index), { found } = match;
    const share = (part, whole) => `${Math.round(100 * part / Math.max(1, whole))}%`;
    const node = block(set().models[index], [
      `Rouge-L ${answer[SCORE].toFixed(1)}`,
      found ? `${found.answer.length} in common: ${share(found.answer.length, found.numAnswer)} of the answer, ` +
        `${share(found.answer.length, found.numReference)} of the reference` : 'too long to mark',
      answer[EXACT] ? 'exact match' : '', `${answer[WORDS]} words`, answer[CUT] ? 'cut off' : '',
    ].filter(Boolean).join(' \u00b7 '), answer[TEXT], found ? found.answer : []);
    if (answer[REPLY] !== undefined) {
      const judged = make('details');
      judged.append(make('summary', `judge: ${answer[READ] || 'unreadable'}`), make('pre', answer[REPLY]));
      node.append(judged);
    }
    return node;
  }
  function showExample() {
    const pane = find('example');
    if (!chosen) { pane.replaceChildren(make('p', 'Choose a dot or a row.', 'note')); return; }
    const place = rows.indexOf(chosen), row = chosen, head = make('div', undefined, 'pages');
    const link = make('a', 'link to this example');
    link.href = address(row);
    const turn = (text, by) => {
      const button = make('button', text);
      button.type = 'button';
      button.disabled = !rows[place + by];
      button.addEventListener('click', () => show(rows[place + by]));
      return button;
    };
    head.append(make('h3', [row.id, row.category, set().buckets[answerOf(row, model())[BUCKET]]].filter(Boolean)
      .join(' \u00b7 ')), turn('Previous', -1), turn('Next', 1), link);
    const shown = [model(), other()].filter((index, i, all) => index !== null && all.indexOf(index) === i);
    const matches = new Map(shown.map(index => [index, best(answerOf(row, index)[TEXT], row.references)]));
    const grid = make('div', undefined, 'answers'), first = matches.get(model());
    row.references.forEach((text, index) => grid.append(block(
      row.references.length > 1 ? `Reference ${index + 1}` : 'Reference',
      index === first.index ? `marked: what Rouge-L counts for ${set().models[model()]}` : '', text,
      index === first.index && first.found ? first.found.reference : [])));
    for (const index of shown) grid.append(answerBlock(row, index, matches.get(index)));
    const prompt = row.messages.map(([role, text]) => block(role, '', text));
    const parts = [head, ...prompt, grid];
    const rest = set().models.map((_, index) => index).filter(index => !shown.includes(index));
    if (rest.length) {
      const more = make('details', undefined, 'part'), inside = make('div', undefined, 'answers');
      more.append(make('summary', `The other ${rest.length === 1 ? 'model' : `${rest.length} models`}`), inside);
      more.addEventListener('toggle', () => {  // made when it is first opened
        if (!inside.children.length) {
          for (const index of rest) inside.append(answerBlock(row, index, best(answerOf(row, index)[TEXT], row.references)));
        }
      });
      parts.push(more);
    }
    pane.replaceChildren(...parts);
  }

  function show(row) {
    chosen = row;
    const place = rows.indexOf(row);
    if (place >= 0) page = Math.floor(place / PER_PAGE);
    showAll();
  }
  function showAll() { showScatter(); showList(); showExample(); keepAddress(); }
  function update() {
    choose();
    if (!chosen || !rows.includes(chosen)) chosen = rows[0] ?? null;
    page = Math.max(0, Math.floor(rows.indexOf(chosen) / PER_PAGE));
    showAll();
  }
  function turnPage(by) { page += by; showList(); }

  fill('set', data.sets.map((found, index) => [String(index), found.name]));
  readAddress();
  update();
  for (const id of CONTROLS.slice(1)) {
    find(id).addEventListener(find(id).tagName === 'SELECT' ? 'change' : 'input', update);
  }
  find('set').addEventListener('change', () => {
    const [value, first] = [find('set').value, defaults.set];
    fillControls();
    find('set').value = value;
    defaults.set = first;
    chosen = null;
    update();
  });
  find('keys').addEventListener('change', keepAddress);
  find('before').addEventListener('click', () => turnPage(-1));
  find('after').addEventListener('click', () => turnPage(1));
  window.addEventListener('hashchange', () => { readAddress(); update(); });
  window.addEventListener('beforeprint', () => {
    for (const part of document.querySelectorAll('details.part')) part.open = true;
  });
  document.addEventListener('keydown', event => {
    if (event.altKey || event.ctrlKey || event.metaKey || !find('keys').checked) return;
    if (event.key === 'Escape' && event.target === find('search')) { find('search').blur(); return; }
    if (['INPUT', 'SELECT', 'TEXTAREA'].includes(event.target.tagName)) return;
    if (event.key === '/') { event.preventDefault(); find('search').focus(); }
    const next = rows[rows.indexOf(chosen) + { j: 1, k: -1 }[event.key]];
    if (next) show(next);
  });
  document.documentElement.dataset.ready = 'yes';
})();
