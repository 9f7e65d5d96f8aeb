// @ts-check
// The spectrogram of music while it arrives, column by column: the picture that the server draws of
// the finished take (see `audio/spectrogram.py`, whose numbers these are), so that the one takes the
// other's place unseen.

/** @typedef {import('./picture.js').Edges} Edges */

const BANDS = 160, MOST_COLUMNS = 2200, WINDOW_S = 0.064, PADDING = 2, RANGE_DB = 80, LOWEST_HZ = 30;
const ENDLESS_COLUMNS = 4096; // kept of an endless piece
const BUDGET_MS = 6; // of a frame of the screen
const BEHIND_S = 10; // a page out of sight draws no frames: so much sound may wait
// matplotlib's "magma" in 32 steps; in between, colours are mixed
const MAGMA = '000004 030312 0a0822 130d34 1d1147 29115a 36106b 440f76 51127c 5d177f 6a1c81 762181 '
  + '832681 902a81 9c2e7f aa337d b73779 c43c75 d0416f dc4869 e75263 ef5d5e f56b5c f9795d fc8961 '
  + 'fd9869 fea772 feb67c fec488 fed395 fde2a3 fcf0b2 fcfdbf';

/** @param {number} hz */
const mel = (hz) => 2595 * Math.log10(1 + hz / 700);
/** @param {number} value */
const hertz = (value) => 700 * (10 ** (value / 2595) - 1);

/** 256 colours, red, green, blue and opacity each. */
export function palette() {
  const steps = MAGMA.split(' ').map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const colours = new Uint8ClampedArray(4 * 256).fill(255);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (steps.length - 1), low = Math.min(Math.floor(at), steps.length - 2);
    for (let c = 0; c < 3; c++)
      colours[4 * i + c] = steps[low][c] + (at - low) * (steps[low + 1][c] - steps[low][c]);
  }
  return colours;
}

/** The power spectrum of real samples: an FFT of half the length on pairs of them. */
export class Fft {
  /** @param {number} size of the transform, a power of 2 */
  constructor(size) {
    this.size = size;
    const half = size / 2;
    this.re = new Float64Array(half);
    this.im = new Float64Array(half);
    this.power = new Float64Array(half + 1);
    this.cos = Float64Array.from({ length: half }, (_, i) => Math.cos((2 * Math.PI * i) / size));
    this.sin = Float64Array.from({ length: half }, (_, i) => -Math.sin((2 * Math.PI * i) / size));
    this.order = new Uint32Array(half); // bits reversed
    for (let i = 1; i < half; i++) this.order[i] = (this.order[i >> 1] >> 1) | (i & 1 ? half >> 1 : 0);
  }

  /** @param {Float64Array} samples `size` of them */
  transform(samples) {
    const { size, re, im, cos, sin, order, power } = this, half = size / 2;
    for (let i = 0; i < half; i++) {
      re[order[i]] = samples[2 * i];
      im[order[i]] = samples[2 * i + 1];
    }
    for (let length = 2; length <= half; length *= 2) {
      const step = size / length;
      for (let start = 0; start < half; start += length) {
        for (let k = 0; k < length / 2; k++) {
          const a = start + k, b = a + length / 2, c = cos[k * step], s = sin[k * step];
          const x = re[b] * c - im[b] * s, y = re[b] * s + im[b] * c;
          re[b] = re[a] - x;
          im[b] = im[a] - y;
          re[a] += x;
          im[a] += y;
        }
      }
    }
    for (let k = 0; k <= half; k++) { // the pairs taken apart again
      const i = k % half, j = (half - k) % half;
      const even_re = (re[i] + re[j]) / 2, even_im = (im[i] - im[j]) / 2;
      const odd_re = (im[i] + im[j]) / 2, odd_im = (re[j] - re[i]) / 2;
      const c = k === half ? -1 : cos[k], s = k === half ? 0 : sin[k];
      const x = even_re + odd_re * c - odd_im * s, y = even_im + odd_re * s + odd_im * c;
      power[k] = x * x + y * y;
    }
    return power;
  }
}

/** Samples in, columns of levels in decibels out. */
export class Analyser {
  /**
   * @param {number} rate Hz
   * @param {number} channels
   * @param {number} frames of the whole piece, as far as it is known
   */
  constructor(rate, channels, frames) {
    this.rate = rate;
    this.channels = channels;
    const column = Math.floor(frames / MOST_COLUMNS);
    this.window = 2 ** Math.round(Math.log2(Math.max(WINDOW_S * rate, column)));
    this.hop = Math.max(this.window / 4, column); // frames from one column to the next
    this.columns = 0; // that were made
    /** @type {Int16Array[]} */
    this.pieces = []; // that came and are not in `held` yet
    this.waiting = 0; // frames of them
    this.held = new Float32Array(channels * 2 * Math.max(this.window, this.hop));
    this.start = 0; // the frame that `held` begins with
    this.count = 0; // frames in it
    const size = PADDING * this.window;
    this.fft = new Fft(size);
    this.samples = new Float64Array(size);
    this.shape = Float64Array.from({ length: this.window }, (_, i) =>
      (1 - Math.cos((2 * Math.PI * i) / this.window)) * (2 / this.window));
    this.levels = new Float32Array(channels * BANDS);
    this.filters = filters(rate, size);
  }

  /** @param {Int16Array} pcm whole frames, interleaved */
  add(pcm) {
    this.pieces.push(pcm.slice());
    this.waiting += pcm.length / this.channels;
  }

  /** Moves samples on until a column has all of its own; whether it has. */
  fill() {
    const { channels, hop, window, held } = this, first = this.columns * hop - window / 2;
    const dropped = Math.max(0, Math.min(first - this.start, this.count));
    held.copyWithin(0, dropped * channels, this.count * channels);
    this.count -= dropped;
    this.start += dropped;
    const needed = first + window - this.start; // frames
    while (this.count < needed && this.pieces.length) {
      const piece = this.pieces[0];
      const taken = Math.min(piece.length, (needed - this.count) * channels);
      for (let i = 0; i < taken; i++) held[this.count * channels + i] = piece[i] / 32768;
      this.count += taken / channels;
      this.waiting -= taken / channels;
      if (taken < piece.length) this.pieces[0] = piece.subarray(taken);
      else this.pieces.shift();
    }
    return this.count >= needed;
  }

  /** The next column, [channel x band] in dB below full scale, the lowest band first; null: later. */
  next() {
    if (!this.fill()) return null;
    const { channels, window, samples, shape, held, filters, levels } = this;
    const offset = this.columns * this.hop - window / 2 - this.start;
    for (let channel = 0; channel < channels; channel++) {
      for (let i = 0; i < window; i++) {
        const frame = offset + i;
        samples[i] = frame < 0 ? 0 : held[frame * channels + channel] * shape[i];
      }
      const power = this.fft.transform(samples);
      filters.forEach(({ first, weights }, band) => {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) sum += weights[i] * power[first + i];
        levels[channel * BANDS + band] = 10 * Math.log10(Math.max(sum / PADDING, 1e-12));
      });
    }
    this.columns += 1;
    return levels;
  }
}

/**
 * Triangles in mel over the bins of a transform.
 * @param {number} rate Hz
 * @param {number} size
 */
function filters(rate, size) {
  const low = mel(LOWEST_HZ), step = (mel(rate / 2) - low) / (BANDS + 1);
  return Array.from({ length: BANDS }, (_, band) => {
    const [left, middle, right] = [0, 1, 2].map((i) => hertz(low + (band + i) * step));
    const first = Math.max(0, Math.ceil((left * size) / rate));
    const last = Math.min(size / 2, Math.floor((right * size) / rate));
    const weights = new Float32Array(Math.max(0, last - first + 1));
    for (let i = 0; i < weights.length; i++) {
      const hz = ((first + i) * rate) / size;
      weights[i] = Math.max(0, Math.min((hz - left) / (middle - left), (right - hz) / (right - middle)));
    }
    return { first, weights };
  });
}

/** The picture, as far as there is sound for it. */
export class Spectrogram {
  /**
   * @param {number} rate Hz
   * @param {number} channels
   * @param {number} total_s of the piece; Infinity: it is endless
   */
  constructor(rate, channels, total_s) {
    const endless = total_s === Infinity, frames = endless ? 0 : Math.round(total_s * rate);
    this.analyser = new Analyser(rate, channels, frames);
    this.endless = endless;
    this.first = 0; // the column at the left edge
    const columns = endless ? ENDLESS_COLUMNS : Math.floor(frames / this.analyser.hop) + 1;
    this.canvas = document.createElement('canvas');
    Object.assign(this.canvas, { width: columns, height: BANDS * channels });
    this.pen = /** @type {CanvasRenderingContext2D} */ (this.canvas.getContext('2d'));
    this.column = this.pen.createImageData(1, BANDS * channels);
    this.palette = new Uint32Array(palette().buffer);
  }

  /** @returns {Edges} */
  get edges() {
    const { rate, hop, channels } = this.analyser, { width } = this.canvas;
    const [low, high] = [mel(LOWEST_HZ), mel(rate / 2)], half = (high - low) / (BANDS + 1) / 2;
    return {
      start_s: ((this.first - 0.5) * hop) / rate, end_s: ((this.first + width - 0.5) * hop) / rate,
      low_hz: hertz(low + half), high_hz: hertz(high - half), channels,
    };
  }

  /** @param {Int16Array} pcm whole frames, interleaved */
  add(pcm) {
    this.analyser.add(pcm);
    if (this.analyser.waiting > BEHIND_S * this.analyser.rate) this.work(Infinity);
  }

  /** Draws what there is sound for, for a moment; whether more is left. */
  work(budget_ms = BUDGET_MS) {
    const until = performance.now() + budget_ms, { analyser } = this;
    while (performance.now() < until) {
      const at = analyser.columns - this.first;
      if (at >= this.canvas.width && !this.endless) return false;
      const levels = analyser.next();
      if (!levels) return false;
      this.paint(levels, at >= this.canvas.width ? this.shift(at) : at);
    }
    return true;
  }

  /**
   * Makes room on the right for an endless piece.
   * @param {number} at
   */
  shift(at) {
    const half = this.canvas.width / 2;
    this.pen.globalCompositeOperation = 'copy';
    this.pen.drawImage(this.canvas, -half, 0);
    this.pen.globalCompositeOperation = 'source-over';
    this.first += half;
    return at - half;
  }

  /**
   * @param {Float32Array} levels
   * @param {number} x
   */
  paint(levels, x) {
    const pixels = new Uint32Array(this.column.data.buffer);
    for (let i = 0; i < levels.length; i++) {
      const channel = Math.floor(i / BANDS), y = channel * BANDS + BANDS - 1 - (i % BANDS);
      const value = Math.floor((levels[i] / RANGE_DB + 1) * 256);
      pixels[y] = this.palette[Math.max(0, Math.min(255, value))];
    }
    this.pen.putImageData(this.column, x, 0);
  }
}
