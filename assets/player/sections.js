// @ts-check
// The sections of a piece as rows: a time, words, and a button that removes them. The rows are the
// request's own: [[start, words], …], where a start is a number of seconds or what was typed.

import { seconds_of, time_of } from './times.js';

/** @typedef {[number | string, string]} Row */

export class SectionRows {
  /**
   * @param {HTMLElement} root with `.section-rows`, `.section-add` and `.section-said`
   * @param {number} most rows
   * @param {(rows: Row[]) => void} changed is told the rows as they are now
   */
  constructor(root, most, changed) {
    this.root = root;
    this.most = most;
    this.changed = changed;
    /** @type {Row[]} */
    this.rows = [];
    this.list = /** @type {HTMLElement} */ (root.querySelector('.section-rows'));
    this.add = /** @type {HTMLButtonElement} */ (root.querySelector('.section-add'));
    this.add.addEventListener('click', () => this.append());
    this.list.addEventListener('input', (event) => this.typed(event));
    this.list.addEventListener('change', () => {
      this.label();
      setTimeout(() => this.sort()); // the focus has gone on by then
    });
    this.list.addEventListener('keydown', (event) => this.key(event));
    this.list.addEventListener('click', ({ target }) => {
      const button = target instanceof Element && target.closest('.section-remove');
      if (button) this.remove(this.items.indexOf(/** @type {Element} */ (button.closest('li'))));
    });
  }

  get items() {
    return [...this.list.children];
  }

  /** @param {Row[] | null} rows from the server; one empty row invites to type where there is none */
  show(rows) {
    this.rows = (rows?.length ? rows : [['', '']]).map(([at, words]) => [at ?? '', words ?? '']);
    this.build();
  }

  build() {
    this.list.replaceChildren(...this.rows.map(([at, words]) => item(at, words)));
    this.label();
  }

  /** Rows have numbers, by which errors name them. */
  label() {
    this.items.forEach((each, index) => {
      const name = `section ${index + 1}`, [at, words] = fields(each);
      at.setAttribute('aria-label', `Start of ${name}, in seconds or as minutes:seconds`);
      words.setAttribute('aria-label', `Words of ${name}`);
      each.querySelector('button')?.setAttribute('aria-label', `Remove ${name}`);
      at.setAttribute('aria-invalid', String(Boolean(at.value) && isNaN(seconds_of(at.value))));
    });
    this.add.disabled = this.rows.length >= this.most;
  }

  append() {
    if (this.add.disabled) return;
    this.rows.push(['', '']);
    this.list.append(item('', ''));
    this.label();
    this.changed([...this.rows]);
    fields(this.items[this.rows.length - 1])[0].focus();
  }

  /** @param {number} index */
  remove(index) {
    const empty = !this.rows[index].some(Boolean);
    this.rows.splice(index, 1);
    this.items[index].remove();
    if (!this.rows.length) this.show([]);
    this.label();
    this.say(empty ? '' : `Section ${index + 1} is removed.`);
    this.changed(this.rows.some((row) => row.some(Boolean)) ? [...this.rows] : []);
    const next = this.items[Math.min(index, this.rows.length - 1)];
    /** @type {HTMLElement} */ (next.querySelector('.section-remove')).focus();
  }

  /** @param {Event} event */
  typed({ target }) {
    const index = this.items.findIndex((each) => each.contains(/** @type {Node} */ (target)));
    const [at, words] = fields(this.items[index]);
    if (target === at) this.rows[index][0] = at.value.trim();
    else this.rows[index][1] = words.value;
    this.changed([...this.rows]);
  }

  /** Rows stand in the order of time; those without a time stay where they were put. */
  sort() {
    const at = (/** @type {number} */ i) => {
      const [start] = this.rows[i];
      return typeof start === 'number' ? start : seconds_of(start);
    };
    const all = this.rows.map((_, i) => i), timed = all.filter((i) => !isNaN(at(i)));
    const sorted = [...timed].sort((a, b) => at(a) - at(b) || a - b);
    if (sorted.every((from, i) => from === timed[i])) return;
    timed.forEach((place, i) => (all[place] = sorted[i]));
    const { rows, items } = this, focused = document.activeElement;
    this.rows = all.map((i) => rows[i]);
    this.list.replaceChildren(...all.map((i) => items[i]));
    // What is moved loses the focus.
    if (focused instanceof HTMLElement && this.list.contains(focused)) focused.focus();
    this.label();
    this.say('The sections are in order of time.');
    this.changed([...this.rows]);
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    if (event.key !== 'Enter' || event.ctrlKey || event.metaKey || event.isComposing) return;
    const { target } = event;
    if (!(target instanceof HTMLElement) || !target.matches('input, textarea')) return;
    event.preventDefault();
    const index = this.items.findIndex((each) => each.contains(target));
    const [at, words] = fields(this.items[index]);
    if (target === at) words.focus();
    else if (index + 1 < this.rows.length) fields(this.items[index + 1])[0].focus();
    else this.append();
  }

  /** @param {string} text to a screen reader */
  say(text) {
    /** @type {HTMLElement} */ (this.root.querySelector('.section-said')).textContent = text;
  }
}

/**
 * @param {Element} row
 * @returns {[HTMLInputElement, HTMLTextAreaElement]}
 */
function fields(row) {
  return [
    /** @type {HTMLInputElement} */ (row.querySelector('.section-at')),
    /** @type {HTMLTextAreaElement} */ (row.querySelector('.section-words')),
  ];
}

/**
 * @param {number | string} at
 * @param {string} words
 */
function item(at, words) {
  const row = document.createElement('li');
  row.innerHTML = '<input class="section-at" type="text" inputmode="text" autocomplete="off" '
    + 'placeholder="0:20"><textarea class="section-words" rows="1" dir="auto" '
    + 'placeholder="drums and bass join"></textarea>'
    + '<button type="button" class="section-remove">✕</button>';
  const [start, text] = fields(row);
  start.value = typeof at === 'number' ? time_of(at) : at;
  text.value = words;
  return row;
}
