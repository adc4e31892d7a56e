// Runs the script of a report's page over a stand-in for the browser's elements, and prints what the list then shows.
// node browse.js report.html '[["sort", "gap 0 1"], ["search", "text"], ["key", "j"]]'
'use strict';
const html = require('fs').readFileSync(process.argv[2], 'utf8');
const scripts = [...html.matchAll(/<script[^>]*>([\s\S]*?)<\/script>/g)].map(match => match[1]);

class Element {
  constructor(tag) {
    Object.assign(this, { tagName: tag.toUpperCase(), children: [], listeners: {}, text: '', own: '' });
  }
  append(...nodes) { this.children.push(...nodes); }
  replaceChildren(...nodes) { this.children = nodes; this.own = ''; }
  addEventListener(kind, listener) { this.listeners[kind] = listener; }
  scrollIntoView() {}
  focus() { document.focused = this; }
  get value() { return this.own || (this.tagName === 'SELECT' && this.children[0] ? this.children[0].value : ''); }
  set value(value) { this.own = value; }
  get textContent() { return this.text + this.children.map(child => child.textContent).join(' | '); }
  set textContent(text) { this.text = String(text); }
}

const byId = { examples: new Element('script') };
byId.examples.text = scripts[0];
for (const [, tag, id] of html.matchAll(/<(\w+) id="(\w+)"/g)) byId[id] = new Element(tag);
const document = {
  listeners: {},
  getElementById: id => byId[id],
  createElement: tag => new Element(tag),
  addEventListener(kind, listener) { this.listeners[kind] = listener; },
};
new Function('document', scripts[1])(document);
for (const [what, value] of JSON.parse(process.argv[3])) {
  if (what === 'key') {
    document.listeners.keydown({ key: value, target: { tagName: 'BODY' }, preventDefault() {} });
  } else {
    byId[what].value = value;
    byId[what].listeners[what === 'search' ? 'input' : 'change']();
  }
}
console.log(JSON.stringify({
  place: byId.place.textContent,
  rows: byId.list.children.map(row => row.textContent),
  sorts: byId.sort.children.map(option => option.textContent),
  focused: Boolean(document.focused),
}));
