const data = JSON.parse(document.getElementById('data').textContent);
const $ = id => document.getElementById(id), all = q => [...document.querySelectorAll(q)];
const body = document.querySelector('.list tbody'), rows = [...body.rows];
const menus = ['paradigm', 'verified', 'unlike', 'since'].map($), tris = all('.tri');
const plain = s => s.toLowerCase().normalize('NFKD').replace(/[^a-z0-9]+/g, ' ').trim();
const found = rows.map(r => ' ' + plain(r.dataset.s));
let order = ['', 1];

// ---- search, filters, order

function kept(row, i) {
  const d = row.dataset, [p, v, u, y] = menus.map(m => m.value);
  const needs = d.n.split(' ');
  return plain($('q').value).split(' ').every(word => found[i].includes(' ' + word)) &&
    (!p || d.p === p) && (!v || d.v === v) && (!y || +d.y >= +y) &&
    (!u || d.u.split(' ').includes(u)) &&
    tris.every(t => t.dataset.on === '0' || needs.includes(t.dataset.need) === (t.dataset.on === '1'));
}

function show() {
  let n = 0;
  rows.forEach((row, i) => { row.hidden = !kept(row, i); n += !row.hidden; });
  $('count').textContent = n === rows.length ? `${n} methods` : `${n} of ${rows.length} methods`;
  $('clear').hidden = n === rows.length && !$('q').value;
  remember();
}

function gainOf(row) { return data.runs[$('table').value].m[row.dataset.k]?.g; }

function gains() {
  const e = data.runs[$('table').value];
  for (const row of rows) {
    const g = gainOf(row), cell = row.querySelector('.gain');
    cell.replaceChildren();
    if (!g) continue;
    const sign = g[0] < 0 ? '−' : '+', digits = e.digits;
    const b = document.createElement('b');
    b.className = g[0] < 0 ? 'down' : 'up';
    b.textContent = sign + Math.abs(g[0]).toFixed(digits);
    const small = document.createElement('small');
    small.textContent = g[1] === null ? 'one seed' : `± ${g[1].toFixed(digits)}, ${g[2]} seeds`;
    cell.append(b, ' ', small);
  }
  $('about').textContent = `${e.label}: last value, against ${e.reference}; ${e.metric}.` +
    (e.smoke ? ' A smoke test: it shows that each method trains, and ranks nothing.' : '');
}

const keys = {
  name: r => r.dataset.k, paradigm: r => r.dataset.p, year: r => +r.dataset.y || null,
  gain: r => gainOf(r)?.[0] ?? null, cost: r => r.dataset.c ? +r.dataset.c : null,
  memory: r => r.dataset.m ? +r.dataset.m : null, lines: r => +r.dataset.l,
};

function sort(key, way) {
  order = [key, way];
  const value = new Map(rows.map(r => [r, keys[key](r)]));
  const sorted = [...rows].sort((a, b) => {
    const [x, y] = [value.get(a), value.get(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return way * (typeof x === 'string' ? x.localeCompare(y) : x - y) || a.dataset.k.localeCompare(b.dataset.k);
  });
  body.append(...sorted);
  all('th[data-key]').forEach(th => {
    if (th.dataset.key === key) th.setAttribute('aria-sort', way > 0 ? 'ascending' : 'descending');
    else th.removeAttribute('aria-sort');
  });
  $('order').value = `${key} ${way}`;
  remember();
}

// ---- compare

const chosen = () => rows.filter(r => r.querySelector('.pick input').checked).map(r => r.dataset.k);

function tray() {
  const names = chosen();
  $('tray').hidden = !names.length;
  $('chosen').textContent = names.join(', ');
  $('go').disabled = names.length < 1;
  $('go').textContent = `Compare ${names.length}`;
  all('.pick input').forEach(box => { box.disabled = !box.checked && names.length >= 8; });
  if (!$('compare').hidden) compare();
  remember();
}

const SVG = (tag, attributes, text) => {
  const e = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  return e;
};
const HTML = (tag, name, ...inside) => {
  const e = document.createElement(tag);
  if (name) e.className = name;
  e.append(...inside);
  return e;
};

function ticks(low, high) {
  const span = (high - low) / 5, ten = 10 ** Math.floor(Math.log10(span));
  const unit = ten * [1, 2, 5, 10].find(m => ten * m >= span * 0.999);
  const made = [];
  for (let k = Math.ceil(low / unit); k * unit <= high; k++) made.push(+(k * unit).toFixed(6));
  return made;
}

function range(values, share) {
  const low = Math.min(...values), high = Math.max(...values);
  const pad = (high - low) * share || Math.abs(high) * 0.01 || 1;
  return [low - pad, high + pad];
}

function dots(lines, metric) {
  const values = lines.flatMap(l => l.values), [low, high] = range(values, 0.08);
  const left = 130, width = 400, row = 26, height = row * lines.length + 40;
  const at = v => left + (v - low) / (high - low) * width;
  const svg = SVG('svg', {class: 'plot', viewBox: `0 0 560 ${height}`, role: 'img',
    'aria-label': lines.map(l => `${l.name}: ${l.values.map(v => v.toFixed(2)).join(', ')}`).join('; ')});
  for (const t of ticks(low, high)) {
    svg.append(SVG('path', {class: 'grid', d: `M${at(t)} 4V${height - 34}`}),
      SVG('text', {class: 'tick', x: at(t), y: height - 18}, t));
  }
  lines.forEach((l, i) => {
    const y = 4 + row * (i + 0.5);
    svg.append(SVG('text', {class: 'name', x: left - 10, y: y + 4}, l.name),
      SVG('path', {class: 'grid', d: `M${left} ${y}h${width}`}));
    for (const v of l.values) {
      const dot = SVG('circle', {class: l.look, cx: at(v), cy: y, r: 5.5});
      dot.append(SVG('title', {}, v.toFixed(2)));
      svg.append(dot);
    }
  });
  svg.append(SVG('text', {class: 'tick', x: left + width / 2, y: height - 3}, metric));
  return svg;
}

function curves(lines, levels, metric, late) {
  const values = [...lines.flatMap(l => l.curve), ...levels], [low, high] = range(values, 0.06);
  const left = 44, top = 8, width = 500, height = 210, n = Math.max(...lines.map(l => l.curve.length));
  const at = (i, v) => `${(left + i / Math.max(n - 1, 1) * width).toFixed(1)} ` +
    `${(top + (high - v) / (high - low) * height).toFixed(1)}`;
  const svg = SVG('svg', {class: 'plot', viewBox: '0 0 560 250', role: 'img', 'aria-label':
    `${metric} per evaluation. ` + lines.map(l => `${l.name}: ${l.curve.join(', ')}`).join('; ')});
  for (const t of ticks(low, high)) {
    const y = at(0, t).split(' ')[1];
    svg.append(SVG('path', {class: 'grid', d: `M${left} ${y}h${width}`}),
      SVG('text', {class: 'tick end', x: left - 7, y: +y + 4}, t));
  }
  for (const v of levels) svg.append(SVG('path', {class: 'level', d: `M${at(0, v)}h${width}`}));
  for (const l of lines) svg.append(SVG('path', {class: l.look + ' line', d: 'M' + l.curve.map((v, i) => at(late ? n - l.curve.length + i : i, v)).join('L')}));
  for (let i = 0; i < n; i++) svg.append(SVG('text', {class: 'tick', x: at(i, low).split(' ')[0], y: top + height + 17}, i + 1));
  return svg;
}

function compare() {
  const names = chosen(), place = $('panels');
  place.replaceChildren();
  for (const e of data.runs) {
    const here = names.filter(name => e.m[name]);
    if (!here.length) continue;
    const one = e.m[here[0]], look = name => `s c${names.indexOf(name)}`;
    const lines = here.map(name => ({name, look: look(name), values: e.m[name].v, curve: e.m[name].c}));
    const alone = new Map(here.map(name => [JSON.stringify(e.m[name].a), e.m[name]]));
    for (const m of alone.values()) {
      if (m.a.length) lines.push({name: e.reference.replace(/^(the|a) /, ''), look: 'alone', values: m.a, curve: m.b});
    }
    const levels = [...new Set(here.flatMap(name => e.m[name].t))];
    const teacher = levels.length ? [{name: 'teacher', look: 'teacher', values: levels}] : [];
    const panel = HTML('div', 'panel', HTML('h3', '', e.label));
    panel.append(HTML('p', '', `${e.metric}; ${e.smoke ? 'a smoke test, which ranks nothing' : 'a dot is a seed'}` +
      (here.length < names.length ? `; not in this table: ${names.filter(n => !e.m[n]).join(', ')}` : '')));
    const two = HTML('div', 'two', dots([...lines, ...teacher], e.metric));
    if (one.c.length > 2) two.append(curves(lines.filter(l => l.curve.length), levels, e.metric, e.late));
    panel.append(two);
    place.append(panel);
  }
  if (!place.children.length) place.append(HTML('p', '', 'None of these has been trained for a table yet.'));
  const table = HTML('table', ''), facts = ['paradigm', 'year', 'needs', 'verified', 'unlike', 'cost', 'memory', 'lines'];
  const head = HTML('tr', '', HTML('th', '', ''));
  const picked = names.map(name => rows.find(r => r.dataset.k === name));
  picked.forEach((row, i) => {
    const link = HTML('a', '', row.dataset.k);
    link.href = row.querySelector('a').getAttribute('href');
    head.append(HTML('th', '', HTML('span', `key c${i}`), link));
  });
  table.append(HTML('thead', '', head));
  const inside = HTML('tbody', '');
  for (const fact of facts) {
    const title = all(`td[data-f=${fact}]`)[0].dataset.l;
    const line = HTML('tr', '', HTML('th', '', title));
    for (const row of picked) line.append(HTML('td', '', ...[...row.querySelector(`[data-f=${fact}]`).cloneNode(true).childNodes]));
    inside.append(line);
  }
  table.append(inside);
  place.append(HTML('div', 'panel facts', table));
}

function openCompare() {
  $('compare').hidden = false;
  compare();
  $('compare').scrollIntoView();
  $('compare').querySelector('h2').focus();
}

// ---- the address remembers what is shown

let reading = false;

function remember() {
  if (reading) return;
  const state = new URLSearchParams();
  if ($('q').value) state.set('q', $('q').value);
  menus.forEach(m => m.value && state.set(m.id, m.value));
  tris.forEach(t => t.dataset.on !== '0' && state.append(t.dataset.on === '1' ? 'with' : 'without', t.dataset.need));
  if (order[0]) state.set('sort', order.join(' '));
  if ($('table').value !== '0') state.set('table', data.runs[$('table').value].key);
  if (chosen().length) state.set('pick', chosen().join(' '));
  if (!$('compare').hidden) state.set('compare', '1');
  const hash = state.toString();
  history.replaceState(null, '', hash ? '#' + hash : location.pathname + location.search);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  reading = true;
  $('q').value = state.get('q') || '';
  menus.forEach(m => { m.value = state.get(m.id) || ''; if (m.selectedIndex < 0) m.value = ''; });
  tris.forEach(t => mark(t, state.getAll('with').includes(t.dataset.need) ? 1 : state.getAll('without').includes(t.dataset.need) ? 2 : 0));
  $('table').value = Math.max(0, data.runs.findIndex(e => e.key === state.get('table')));
  gains();
  const [key, way] = (state.get('sort') || '').split(' ');
  if (keys[key]) sort(key, +way < 0 ? -1 : 1);
  const picked = (state.get('pick') || '').split(' ');
  rows.forEach(r => { r.querySelector('.pick input').checked = picked.includes(r.dataset.k); });
  $('compare').hidden = !state.get('compare');
  tray();
  reading = false;
  show();
}

function mark(t, on) {
  t.dataset.on = on;
  t.setAttribute('aria-label', `${t.textContent}: ${['does not matter', 'must be needed', 'must not be needed'][on]}`);
}

$('q').addEventListener('input', show);
menus.forEach(m => m.addEventListener('change', show));
tris.forEach(t => t.addEventListener('click', () => { mark(t, (+t.dataset.on + 1) % 3); show(); }));
$('table').addEventListener('change', () => { gains(); if (order[0] === 'gain') sort('gain', -1); remember(); });
all('th[data-key] button').forEach(b => b.addEventListener('click', () => {
  const key = b.closest('th').dataset.key, first = key === 'gain' || key === 'year' ? -1 : 1;
  sort(key, order[0] === key ? -order[1] : first);
}));
$('order').addEventListener('change', () => { const [key, way] = $('order').value.split(' '); sort(key, +way); });
all('.pick input').forEach(box => box.addEventListener('change', tray));
$('go').addEventListener('click', openCompare);
$('none').addEventListener('click', () => { all('.pick input').forEach(b => { b.checked = false; }); $('compare').hidden = true; tray(); $('q').focus(); });
$('clear').addEventListener('click', () => {
  $('q').value = '';
  menus.forEach(m => { m.value = ''; });
  tris.forEach(t => mark(t, 0));
  show();
  $('q').focus();
});
document.addEventListener('keydown', e => {
  if (e.key === '/' && !e.target.closest('input,select,textarea')) { e.preventDefault(); $('q').focus(); }
  if (e.key === 'Escape' && e.target === $('q')) { $('q').value = ''; show(); }
});
window.addEventListener('hashchange', recall);
recall();
