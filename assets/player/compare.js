// @ts-check
// Up to four takes as strips under one playhead: another one sounds at the same place, without a
// gap, at the same loudness. The strips mark `#take_variation`, by which the server knows.

/**
 * @typedef {import('./view.js').View} View
 * @typedef {{ id: string, job: string, wav: { url: string } | null, label: string,
 *   duration_s: number, lufs: number | null, gain_db: number, peaks: string }} Strip
 */

const AHEAD_S = 0.3; // there before a take sounds
const OVERTAKEN_MS = 3000; // so late an answer to an earlier choice may come

/** @param {string} peaks base64 of int8, the lowest of all columns first */
export function outline(peaks) {
  const all = Int8Array.from(atob(peaks), (c) => c.charCodeAt(0)), columns = all.length / 2;
  const most = Math.max(1, ...all.map(Math.abs));
  let path = '';
  for (let i = 0; i < columns; i++) {
    const top = 20 - Math.max((19 * all[columns + i]) / most, 0.4);
    path += `M${i} ${top.toFixed(1)}V${(20 - Math.min((19 * all[i]) / most, -0.4)).toFixed(1)}`;
  }
  return { path, columns };
}

export class Compare {
  /**
   * @param {View} view
   * @param {() => HTMLElement} root
   */
  constructor(view, root) {
    this.view = view;
    this.root = root;
    /** @type {Strip[]} */
    this.takes = [];
    this.chosen = 0;
    this.chosen_at = 0; // ms
    for (const name of ['change', 'samples'])
      view.sound.addEventListener(name, () => this.go_over());
    view.sound.addEventListener('change', () => this.refresh());
    view.compare = this;
  }

  /** @param {{ selected: number, takes: Strip[] } | null} value from the server */
  show(value) {
    const takes = value?.takes ?? [];
    const ids = (/** @type {Strip[]} */ of) => of.map(({ id }) => id).join('\n');
    const same = ids(takes) === ids(this.takes);
    this.takes = takes;
    if (same && takes.length) return;
    this.chosen = value?.selected ?? 0;
    this.chosen_at = 0;
    const { sound } = this.view;
    sound.tracks.forEach((track, number) => {
      if (number === sound.selected) sound.set_gain(number, 0);
      else if (track && !takes.some((take) => this.slot(take) === number)) sound.close(number);
    });
    this.build();
    this.refresh();
  }

  build() {
    const root = this.root(), longest_s = Math.max(...this.takes.map((t) => t.duration_s), 0.1);
    root.hidden = !this.takes.length;
    root.replaceChildren(...this.takes.map((take, index) => {
      const strip = document.createElement('button');
      Object.assign(strip, { type: 'button', className: 'strip' });
      strip.setAttribute('role', 'radio');
      const { path, columns } = outline(take.peaks);
      const gain = take.lufs === null ? '' : `${take.gain_db < 0 ? '−' : ''}${Math.abs(take.gain_db)} dB`;
      strip.innerHTML = `<kbd>${index + 1}</kbd><span class="strip-label" dir="auto"></span>
        <span class="strip-gain" title="so that all are equally loud">${gain}</span>
        <span class="strip-time"><svg viewBox="-.5 0 ${Math.max(columns, 1)} 40" aria-hidden="true"
          preserveAspectRatio="none" style="width:${(100 * take.duration_s) / longest_s}%"><path
          d="${path}"/></svg><i></i></span>`;
      /** @type {HTMLElement} */ (strip.querySelector('.strip-label')).textContent = take.label;
      strip.addEventListener('click', () => this.choose(index));
      return strip;
    }));
    root.onkeydown = (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = (this.chosen + step + this.takes.length) % this.takes.length;
      this.choose(next);
      /** @type {HTMLElement} */ (root.children[next]).focus();
    };
  }

  /**
   * The track that holds a take; -1: none.
   * @param {Strip | undefined} take
   */
  slot(take) {
    const urls = take ? [take.wav?.url, take.job && `jobs/${take.job}/audio`] : [];
    return this.view.sound.tracks.findIndex((track) => track && urls.includes(track.source.url));
  }

  /** Loads what is compared: a change of take is immediate then. */
  load() {
    const { sound } = this.view;
    this.view.load();
    for (const take of this.takes) {
      const is_ours = (/** @type {number} */ n) => this.takes.some((each) => this.slot(each) === n);
      if (this.slot(take) < 0 && take.wav) {
        const free = sound.tracks.findIndex((_, n) => n !== sound.selected && !is_ours(n));
        if (free >= 0) sound.open(free, { url: take.wav.url });
      }
      if (this.slot(take) >= 0) sound.set_gain(this.slot(take), take.gain_db);
    }
  }

  /** @param {number} index */
  choose(index) {
    if (!this.takes[index] || this.view.streaming) return;
    this.chosen = index;
    this.chosen_at = performance.now();
    this.load();
    this.go_over();
    this.refresh();
    const marks = document.querySelectorAll('#take_variation input');
    /** @type {HTMLInputElement | undefined} */ (marks[index])?.click();
  }

  /** Plays the chosen take as soon as it is there. */
  go_over() {
    const { sound } = this.view, number = this.slot(this.takes[this.chosen]);
    if (!this.chosen_at || number < 0 || number === sound.selected) return;
    const track = /** @type {import('./track.js').Track} */ (sound.tracks[number]);
    if (track.rate && (track.complete || track.received_s > sound.position_s + AHEAD_S))
      sound.select(number);
  }

  /**
   * Whether a take is in the player already.
   * @param {string} id
   */
  holds(id) {
    const take = this.takes[this.chosen];
    return Boolean(this.chosen_at) && take?.id === id && this.slot(take) >= 0;
  }

  /**
   * Whether another one was chosen meanwhile.
   * @param {string} id
   */
  is_overtaken(id) {
    const late = performance.now() - this.chosen_at < OVERTAKEN_MS;
    return late && this.takes.some((t) => t.id === id) && this.takes[this.chosen].id !== id;
  }

  refresh() {
    [...this.root().children].forEach((strip, index) => {
      strip.setAttribute('aria-checked', String(index === this.chosen));
      /** @type {HTMLElement} */ (strip).tabIndex = index === this.chosen ? 0 : -1;
    });
    this.place();
  }

  place() {
    if (!this.takes.length) return;
    const longest_s = Math.max(...this.takes.map((take) => take.duration_s), 0.1);
    const at = Math.min(1, this.view.sound.position_s / longest_s);
    for (const head of /** @type {NodeListOf<HTMLElement>} */ (this.root().querySelectorAll('i')))
      head.style.left = `${(100 * at).toFixed(2)}%`;
  }
}
