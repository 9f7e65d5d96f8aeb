// @ts-check
// Draws a take: ruler, waveform and spectrogram on one time axis, with what is marked on it.
// Times are seconds, places are CSS pixels.

/**
 * @typedef {{ start_s: number, end_s: number, low_hz: number, high_hz: number,
 *   channels: number }} Edges see `audio/spectrogram.py`
 * @typedef {{ low: Int8Array, high: Int8Array, columns: number, column_s: number }} Peaks
 * @typedef {{ classes: Uint8Array, column_s: number }} Melody
 * @typedef {[start_s: number, end_s: number, name: string, classes: number[]]} Chord
 * @typedef {{ duration_s: number, prompt_s: number, context_s: number,
 *   chords: Chord[], sections: [number, string][], peaks: Peaks,
 *   image: HTMLImageElement | HTMLCanvasElement | null,
 *   edges: Edges | null, melody: Melody | null }} Shown
 * @typedef {{ from_s: number, to_s: number }} Span what is in view
 */

const CHORD_INK = 'rgb(251 191 36 / .5)';
export const RULER_PX = 26;
const WAVE = 0.3, MELODY = 0.16; // of the height below the ruler
const WAVE_INK = '#2dd4bf', CLIP_INK = '#94a3b8', INK = '#e6e8ef', QUIET = '#a3a9b8';
const GROUND = '#12141c', RULE = '#2c3040', SHADE = 'rgb(18 20 28 / .72)';
const TICKS_HZ = [100, 200, 500, 1000, 2000, 5000, 10000, 20000];
const STEPS_S = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600];
const NOTES = ['C', 'C♯', 'D', 'D♯', 'E', 'F', 'F♯', 'G', 'G♯', 'A', 'A♯', 'B'];

/** @param {number} hz */
const mel = (hz) => 2595 * Math.log10(1 + hz / 700);
/** @param {number} value */
const hertz = (value) => 700 * (10 ** (value / 2595) - 1);

/**
 * "0:07", or "0:07.25" with two digits.
 * @param {number} seconds
 */
export function clock(seconds, digits = 0) {
  const units = 10 ** digits, all = Math.floor(Math.max(0, seconds) * units + 1e-6);
  const minutes = Math.floor(all / units / 60);
  const rest = ((all - minutes * 60 * units) / units).toFixed(digits);
  return `${minutes}:${rest.padStart(digits ? 3 + digits : 2, '0')}`;
}

/** @param {number} hz */
const hertz_text = (hz) => (hz >= 1000 ? `${(hz / 1000).toFixed(1)} kHz` : `${Math.round(hz)} Hz`);

export class Picture {
  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.canvas = canvas;
    this.pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext('2d'));
    this.width = 0;
    this.height = 0;
    /** @type {Span} */
    this.span = { from_s: 0, to_s: 1 };
  }

  /** Fits the canvas to its place and the screen's pixels. */
  fit() {
    const { clientWidth, clientHeight } = this.canvas, density = devicePixelRatio || 1;
    this.width = clientWidth;
    this.height = clientHeight;
    const [width, height] = [clientWidth, clientHeight].map((px) => Math.round(px * density));
    if (this.canvas.width !== width || this.canvas.height !== height)
      Object.assign(this.canvas, { width, height });
    this.pen.setTransform(density, 0, 0, density, 0, 0);
  }

  /** @param {number} seconds */
  x_of(seconds) {
    const { from_s, to_s } = this.span;
    return ((seconds - from_s) / (to_s - from_s)) * this.width;
  }

  /** @param {number} x */
  time_at(x) {
    const { from_s, to_s } = this.span;
    return from_s + (x / this.width) * (to_s - from_s);
  }

  /**
   * Top and height of each strip; without a spectrogram the waveform has its place too.
   * @param {Shown} shown
   */
  rows(shown) {
    const all = this.height - RULER_PX;
    const drawn = shown.image !== null && shown.edges !== null;
    const melody = shown.melody || shown.chords.length ? Math.round(all * MELODY) : 0;
    const wave = drawn ? Math.round(all * WAVE) : all - melody;
    const level = all - wave - melody;
    const top = RULER_PX + wave;
    return {
      wave: { top: RULER_PX, height: wave },
      level: { top, height: level },
      melody: { top: top + level, height: melody },
    };
  }

  /**
   * What lies at a place, in words.
   * @param {Shown} shown
   * @param {number} x
   * @param {number} y
   */
  at(shown, x, y) {
    const words = [clock(this.time_at(x), 2)];
    const { level } = this.rows(shown), { edges } = shown;
    if (edges && level.height && y >= level.top && y < level.top + level.height) {
      const height = level.height / edges.channels;
      const [low, high] = [mel(edges.low_hz), mel(edges.high_hz)];
      const share = 1 - ((y - level.top) % height) / height;
      words.push(hertz_text(hertz(low + share * (high - low))));
    }
    return words.join(' · ');
  }

  /** @param {Shown} shown */
  draw(shown) {
    this.fit();
    const { pen, width, height } = this;
    pen.fillStyle = GROUND;
    pen.fillRect(0, 0, width, height);
    const rows = this.rows(shown);
    pen.font = '11px system-ui, sans-serif';
    pen.textBaseline = 'middle';
    if (rows.level.height) this.draw_level(shown, rows.level);
    this.draw_wave(shown, rows.wave);
    if (rows.melody.height) this.draw_notes(shown, rows.melody);
    this.draw_ruler();
    this.draw_marks(shown, rows.wave);
  }

  /**
   * @param {Shown} shown
   * @param {{ top: number, height: number }} row
   */
  draw_level({ image, edges }, { top, height }) {
    if (!image || !edges) return;
    const left = this.x_of(edges.start_s), right = this.x_of(edges.end_s);
    this.pen.imageSmoothingQuality = 'high';
    this.pen.drawImage(image, left, top, right - left, height);
    const [low, high] = [mel(edges.low_hz), mel(edges.high_hz)], each = height / edges.channels;
    for (let channel = 0; channel < edges.channels; channel++) {
      let last = Infinity;
      for (const hz of TICKS_HZ) {
        const y = top + each * (channel + 1 - (mel(hz) - low) / (high - low));
        if (y < top + each * channel + 7 || y > top + each * (channel + 1) - 7 || last - y < 15) continue;
        last = y;
        this.label(hz >= 1000 ? `${hz / 1000}k` : `${hz}`, 4, y);
      }
      if (edges.channels === 2) {
        const name = channel ? 'right' : 'left';
        this.label(name, this.width - 8 - this.pen.measureText(name).width, top + each * channel + 10);
      }
      if (channel) this.rule(0, top + each * channel, this.width, 1);
    }
  }

  /**
   * @param {Shown} shown
   * @param {{ top: number, height: number }} row
   */
  draw_wave({ peaks, prompt_s }, { top, height }) {
    const { pen, width } = this, middle = top + height / 2, half = height / 2 - 3;
    const columns_s = peaks.column_s;
    this.rule(0, middle - 0.5, width, 1);
    for (let x = 0; x < width; x += 1) {
      const first = Math.max(0, Math.floor(this.time_at(x) / columns_s));
      const last = Math.min(peaks.columns, Math.max(first + 1, Math.floor(this.time_at(x + 1) / columns_s)));
      let low = 127, high = -127;
      for (let column = first; column < last; column++) {
        low = Math.min(low, peaks.low[column]);
        high = Math.max(high, peaks.high[column]);
      }
      if (high < low) continue;
      pen.fillStyle = first * columns_s < prompt_s ? CLIP_INK : WAVE_INK;
      const y = middle - (high / 127) * half;
      pen.fillRect(x, y, 1, Math.max(1, middle - (low / 127) * half - y));
    }
  }

  /**
   * What the music followed, by pitch class.
   * @param {Shown} shown
   * @param {{ top: number, height: number }} row
   */
  draw_notes({ melody, chords, prompt_s }, row) {
    this.pen.fillStyle = '#1d2030';
    this.pen.fillRect(0, row.top, this.width, row.height);
    if (melody?.classes.length) this.draw_melody(melody, prompt_s, row);
    this.draw_chords(chords, row);
    if (melody?.classes.length) this.label('melody', 4, row.top + row.height - 9);
  }

  /**
   * A bar for each note of a chord, and its name where there is room.
   * @param {Chord[]} chords
   * @param {{ top: number, height: number }} row
   */
  draw_chords(chords, { top, height }) {
    const { pen } = this, each = height / NOTES.length;
    let free = 0;
    for (const [from_s, to_s, name, pitches] of chords) {
      const left = this.x_of(from_s), right = this.x_of(to_s);
      if (right < 0 || left > this.width) continue;
      pen.fillStyle = CHORD_INK;
      for (const pitch of pitches)
        pen.fillRect(left, top + height - (pitch + 0.8) * each, right - left - 1, 0.6 * each);
      const x = Math.max(left, 0) + 4, width = pen.measureText(name).width + 8;
      if (x < free || x + width > right) continue;
      this.label(name, x, top + 9);
      free = x + width;
    }
  }

  /**
   * @param {Melody} melody
   * @param {number} start_s
   * @param {{ top: number, height: number }} row
   */
  draw_melody({ classes, column_s }, start_s, { top, height }) {
    const { pen } = this, each = height / NOTES.length;
    pen.fillStyle = WAVE_INK;
    classes.forEach((pitch, column) => {
      const left = this.x_of(start_s + column * column_s);
      const right = this.x_of(start_s + (column + 1) * column_s);
      if (right > 0 && left < this.width)
        pen.fillRect(left, top + height - (pitch + 1) * each, right - left + 0.3, each);
    });
  }

  draw_ruler() {
    const { pen } = this, { from_s, to_s } = this.span;
    const least = ((to_s - from_s) * 58) / this.width;
    const step = STEPS_S.find((s) => s >= least) ?? 600;
    pen.fillStyle = '#1a1d28';
    pen.fillRect(0, 0, this.width, RULER_PX);
    const digits = step >= 1 ? 0 : step >= 0.1 ? 1 : 2;
    for (let number = Math.ceil(from_s / step); number * step <= to_s; number++) {
      const x = this.x_of(number * step), text = clock(number * step, digits);
      pen.fillStyle = QUIET;
      pen.fillRect(x, RULER_PX - 6, 1, 6);
      if (x + 4 + pen.measureText(text).width < this.width) pen.fillText(text, x + 4, RULER_PX / 2);
    }
  }

  /**
   * @param {Shown} shown
   * @param {{ top: number, height: number }} row
   */
  draw_marks({ prompt_s, context_s, sections }, { top }) {
    const { pen } = this;
    if (prompt_s) {
      const x = this.x_of(prompt_s), from = this.x_of(prompt_s - context_s);
      if (context_s > 0) {
        pen.fillStyle = 'rgb(148 163 184 / .45)';
        pen.fillRect(from, RULER_PX - 4, x - from, 4);
        const text = 'the model hears this', words = pen.measureText(`${text} your clip`).width;
        if (x - Math.max(from, 0) > words + 20) this.label(text, Math.max(from, 0) + 4, top + 9);
      }
      this.dash(x);
      this.label('your clip', x - 8 - pen.measureText('your clip').width, top + 9);
      this.label('new', x + 5, top + 9);
    }
    for (const [start_s, words] of sections) {
      const x = this.x_of(start_s);
      if (x < -200 || x > this.width) continue;
      this.dash(x);
      this.label(words.length > 28 ? `${words.slice(0, 27)}…` : words || 'the prompt', x + 5, top + (prompt_s ? 43 : 9));
    }
  }

  /** @param {number} x */
  dash(x) {
    this.pen.fillStyle = INK;
    for (let y = RULER_PX; y < this.height; y += 7) this.pen.fillRect(Math.round(x), y, 1, 4);
  }

  /**
   * @param {number} x
   * @param {number} y
   * @param {number} width
   * @param {number} height
   */
  rule(x, y, width, height) {
    this.pen.fillStyle = RULE;
    this.pen.fillRect(x, y, width, height);
  }

  /**
   * Words that are legible on any picture.
   * @param {string} text
   * @param {number} x
   * @param {number} y
   */
  label(text, x, y) {
    const { pen } = this;
    pen.fillStyle = SHADE;
    pen.fillRect(x - 2, y - 7, pen.measureText(text).width + 5, 14);
    pen.fillStyle = INK;
    pen.fillText(text, x, y);
  }
}

const LIVE_COLUMN_S = 0.01;
export const no_peaks = () => ({
  low: new Int8Array(0), high: new Int8Array(0), columns: 0, column_s: LIVE_COLUMN_S,
});
/** A take of which nothing is here yet. */
export const nothing = (duration_s = 0) => ({
  duration_s, prompt_s: 0, context_s: 0, chords: [], sections: [], peaks: no_peaks(), image: null,
  edges: null, melody: null,
});
/** @param {string} text base64 */
export const bytes_of = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

/** @param {{ peaks: string, peak_s: number }} take */
export function read_peaks({ peaks, peak_s }) {
  const all = new Int8Array(bytes_of(peaks).buffer), columns = all.length / 2;
  return { low: all.subarray(0, columns), high: all.subarray(columns), columns, column_s: peak_s };
}

/**
 * Adds samples to a waveform that grows.
 * @param {Peaks} peaks
 * @param {Int16Array} pcm the last ones
 * @param {number} received frames, with these
 * @param {number} channels
 * @param {number} width frames a column
 */
export function add_peaks(peaks, pcm, received, channels, width) {
  const first = received - pcm.length / channels; // frame
  const columns = Math.ceil(received / width);
  if (columns > peaks.low.length) {
    for (const side of /** @type {const} */ (['low', 'high'])) {
      const longer = new Int8Array(2 * columns + 1000);
      longer.set(peaks[side]);
      peaks[side] = longer;
    }
  }
  for (let i = 0; i < pcm.length; i++) {
    const column = Math.floor((first + Math.floor(i / channels)) / width), value = pcm[i] >> 8;
    if (value < peaks.low[column]) peaks.low[column] = value;
    if (value > peaks.high[column]) peaks.high[column] = value;
  }
  peaks.columns = columns;
}
