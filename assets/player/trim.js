// @ts-check
// A clip as a whole, and the part of it that is kept: by two times, two handles, or a drag.

import { outline } from './compare.js';
import { seconds_of } from './times.js';
import { clock } from './picture.js';

/**
 * @typedef {{ wav: { url: string } | null, start_s: number, end_s: number, peaks: string }} Clip
 *   from the server; of a very long file only the end is on show
 */

const SHORTEST_S = 0.1;
const STEP_S = 0.1;
const ENDS = /** @type {const} */ (['from', 'to']);

export class Trim {
  /**
   * @param {HTMLElement} root
   * @param {(from_s: number, to_s: number) => void} cut is asked for the part
   */
  constructor(root, cut) {
    this.root = root;
    /** @type {[number, number]} */
    this.part = [0, 0]; // seconds of the file
    this.start_s = 0;
    this.end_s = 0;
    this.anchor_s = 0; // where a drag began
    this.dragged = -1; // the handle that is dragged
    this.audio = /** @type {HTMLAudioElement} */ (this.find('audio'));
    this.wave = this.find('wave');
    this.find('play').addEventListener('click', () => this.play());
    this.find('cut').addEventListener('click', () => cut(...this.part));
    this.audio.addEventListener('timeupdate', () => {
      if (this.audio.currentTime >= this.part[1]) this.audio.pause();
    });
    for (const name of ['play', 'pause']) this.audio.addEventListener(name, () => this.refresh());
    ENDS.forEach((name, end) => {
      const field = this.field(name), handle = this.find(`${name}-handle`);
      field.addEventListener('change', () => {
        const s = seconds_of(field.value);
        if (isNaN(s)) this.refresh(); // as it was
        else this.move(end, s);
      });
      handle.addEventListener('keydown', (event) => this.key(event, end));
    });
    this.listen();
  }

  /**
   * @param {string} name
   * @returns {HTMLElement}
   */
  find(name) {
    return /** @type {HTMLElement} */ (this.root.querySelector(`.trim-${name}`));
  }

  /** @param {'from' | 'to'} name */
  field(name) {
    return /** @type {HTMLInputElement} */ (this.find(name));
  }

  /** @param {Clip | null} clip */
  show(clip) {
    this.root.hidden = !clip;
    this.audio.pause();
    this.audio.removeAttribute('src');
    if (!clip) return;
    this.start_s = clip.start_s;
    this.end_s = clip.end_s;
    this.part = [this.start_s, this.end_s];
    if (clip.wav) this.audio.src = clip.wav.url;
    const { path, columns } = outline(clip.peaks);
    const svg = /** @type {Element} */ (this.wave.querySelector('svg'));
    svg.setAttribute('viewBox', `-0.5 0 ${columns} 40`);
    /** @type {Element} */ (svg.firstElementChild).setAttribute('d', path);
    this.refresh();
  }

  /**
   * @param {number} end 0 or 1
   * @param {number} s
   */
  move(end, s) {
    const other = this.part[1 - end];
    const tenths = s > this.end_s - STEP_S / 2 ? this.end_s : Math.round(10 * s) / 10;
    this.part[end] = end
      ? Math.min(this.end_s, Math.max(tenths, other + SHORTEST_S))
      : Math.max(this.start_s, Math.min(tenths, other - SHORTEST_S));
    this.refresh();
  }

  refresh() {
    ENDS.forEach((name, end) => {
      const s = this.part[end], handle = this.find(`${name}-handle`);
      this.field(name).value = clock(s, 1);
      handle.style.left = `${this.percent(s)}%`;
      handle.setAttribute('aria-valuemin', this.start_s.toFixed(1));
      handle.setAttribute('aria-valuemax', this.end_s.toFixed(1));
      handle.setAttribute('aria-valuenow', s.toFixed(1));
      handle.setAttribute('aria-valuetext', `${clock(s, 1)} of ${clock(this.end_s, 1)}`);
    });
    const [from, to] = this.part.map((s) => this.percent(s));
    const part = this.find('part');
    part.style.left = `${from}%`;
    part.style.width = `${to - from}%`;
    this.find('length').textContent = `${(this.part[1] - this.part[0]).toFixed(1)} s`;
    const whole = this.part[0] <= this.start_s && this.part[1] >= this.end_s;
    /** @type {HTMLButtonElement} */ (this.find('cut')).disabled = whole;
    this.find('play').textContent = this.audio.paused ? 'Play' : 'Pause';
  }

  /** @param {number} s */
  percent(s) {
    return (100 * (s - this.start_s)) / (this.end_s - this.start_s);
  }

  play() {
    if (!this.audio.paused) return this.audio.pause();
    const [from, to] = this.part, at = this.audio.currentTime;
    if (at < from || at >= to - 0.05) this.audio.currentTime = from;
    this.audio.play().catch(() => {});
  }

  /**
   * @param {KeyboardEvent} event
   * @param {number} end 0 or 1
   */
  key(event, end) {
    const step = event.shiftKey ? 10 * STEP_S : STEP_S, at = this.part[end];
    /** @type {Record<string, number>} */
    const places = {
      ArrowLeft: at - step, ArrowDown: at - step, ArrowRight: at + step, ArrowUp: at + step,
      PageDown: at - 5, PageUp: at + 5, Home: this.start_s, End: this.end_s,
    };
    if (!(event.key in places) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation(); // the player has keys of the same names
    this.move(end, places[event.key]);
  }

  /** The pointer: a handle, or anywhere else the part as it is drawn. */
  listen() {
    const { wave } = this;
    const time = (/** @type {PointerEvent} */ { clientX }) => {
      const { left, width } = wave.getBoundingClientRect();
      const share = Math.max(0, Math.min(1, (clientX - left) / width));
      return this.start_s + share * (this.end_s - this.start_s);
    };
    wave.addEventListener('pointerdown', (event) => {
      if (event.button) return;
      const handle = event.target instanceof Element && event.target.closest('[role=slider]');
      this.dragged = handle ? Number(handle === this.find('to-handle')) : 2;
      this.anchor_s = time(event);
      wave.setPointerCapture(event.pointerId);
    });
    wave.addEventListener('pointermove', (event) => {
      const at = time(event);
      if (this.dragged === 0 || this.dragged === 1) this.move(this.dragged, at);
      else if (this.dragged === 2 && Math.abs(at - this.anchor_s) >= SHORTEST_S) {
        this.part = [this.start_s, this.end_s];
        this.move(0, Math.min(at, this.anchor_s));
        this.move(1, Math.max(at, this.anchor_s));
      }
    });
    for (const name of ['pointerup', 'pointercancel'])
      wave.addEventListener(name, () => (this.dragged = -1));
  }
}
