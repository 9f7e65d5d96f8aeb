// @ts-check
// The audio thread: up to four tracks under one playhead, each at its own sampling rate.
//
// A track's samples arrive in order and stay, in blocks, so that a seek, a loop and a change of
// track are immediate and no sample is ever dropped. Of an endless track the oldest blocks go.
// The playhead counts frames of the audio context; a track is read where that falls in its own
// rate, through a windowed sinc where the rates differ.

const BLOCK = 1 << 15; // frames
const KEPT_S = 1200; // of a track
const FADE_S = 0.004; // at play, pause and seek: no clicks
const SWITCH_S = 0.012; // from one track to another
const REPORT_S = 0.04;
const TAPS = 32, PHASES = 512; // of the resampling filter
const CUTOFF = 0.96; // of the lower of the two Nyquist frequencies

/**
 * The resampling filter by phase: row p holds the weights of a sample that lies p / PHASES between
 * two samples. Blackman-Harris window.
 * @param {number} cutoff of the source's Nyquist frequency
 */
function sinc_rows(cutoff) {
  const rows = new Float32Array((PHASES + 1) * TAPS);
  for (let phase = 0; phase <= PHASES; phase++) {
    let sum = 0;
    for (let tap = 0; tap < TAPS; tap++) {
      const x = tap - TAPS / 2 + 1 - phase / PHASES; // from the place that is asked for
      const turn = Math.PI * (1 + (2 * x) / TAPS);
      const window = 0.35875 - 0.48829 * Math.cos(turn) + 0.14128 * Math.cos(2 * turn)
        - 0.01168 * Math.cos(3 * turn);
      const sinc = x ? Math.sin(Math.PI * cutoff * x) / (Math.PI * x) : cutoff;
      rows[phase * TAPS + tap] = sinc * window;
      sum += sinc * window;
    }
    for (let tap = 0; tap < TAPS; tap++) rows[phase * TAPS + tap] /= sum;
  }
  return rows;
}

class Track {
  /**
   * @param {number} rate Hz
   * @param {number} channels
   */
  constructor(rate, channels) {
    this.rate = rate;
    this.channels = channels;
    this.received = 0; // frames
    this.complete = false; // no more will come
    this.gain = 1;
    this.share = 0; // 0 to 1: how much of it sounds, on its way to 0 or 1
    /** @type {Map<number, Int16Array>} by number */
    this.blocks = new Map();
    this.rows = rate === sampleRate ? null : sinc_rows(CUTOFF * Math.min(1, sampleRate / rate));
    this.source = new Float32Array(0); // what a call of `render` reads, one channel
  }

  /** @param {Int16Array} pcm whole frames, interleaved */
  append(pcm) {
    for (let from = 0; from < pcm.length;) {
      const number = Math.floor(this.received / BLOCK);
      const at = (this.received % BLOCK) * this.channels;
      let block = this.blocks.get(number);
      if (!block) {
        block = new Int16Array(BLOCK * this.channels);
        this.blocks.set(number, block);
        this.blocks.delete(number - Math.ceil((KEPT_S * this.rate) / BLOCK));
      }
      const piece = pcm.subarray(from, from + block.length - at);
      block.set(piece, at);
      from += piece.length;
      this.received += piece.length / this.channels;
    }
  }

  /** The first context frame that cannot be rendered yet; beyond a complete track is silence. */
  get end() {
    const lead = this.complete || !this.rows ? 0 : TAPS / 2;
    return Math.floor(((this.received - lead) * sampleRate) / this.rate);
  }

  /**
   * Copies frames of one channel to the front of `source`; outside the track they are 0.
   * @param {number} channel
   * @param {number} first
   * @param {number} count
   */
  read(channel, first, count) {
    if (this.source.length < count) this.source = new Float32Array(count);
    for (let i = 0; i < count; i++) {
      const frame = first + i;
      const block = frame >= 0 && frame < this.received && this.blocks.get(Math.floor(frame / BLOCK));
      this.source[i] = block ? block[(frame % BLOCK) * this.channels + channel] / 32768 : 0;
    }
    return this.source;
  }

  /**
   * Adds context frames `first` … `first + count` of a channel to `out` from `at` on, each times
   * its weight in `level`.
   * @param {Float32Array} out
   * @param {Float32Array} level
   * @param {number} channel
   * @param {number} first
   * @param {number} at
   * @param {number} count
   */
  render(out, level, channel, first, at, count) {
    const of = Math.min(channel, this.channels - 1); // mono sounds on both sides
    if (!this.rows) {
      const source = this.read(of, first, count);
      for (let i = 0; i < count; i++) out[at + i] += source[i] * level[at + i];
      return;
    }
    const ratio = this.rate / sampleRate;
    const low = Math.floor(first * ratio) - TAPS / 2 + 1;
    const source = this.read(of, low, Math.ceil(count * ratio) + TAPS + 1);
    for (let i = 0; i < count; i++) {
      const place = (first + i) * ratio, whole = Math.floor(place);
      const row = Math.round((place - whole) * PHASES) * TAPS, from = whole - TAPS / 2 + 1 - low;
      let sum = 0;
      for (let tap = 0; tap < TAPS; tap++) sum += source[from + tap] * this.rows[row + tap];
      out[at + i] += sum * level[at + i];
    }
  }
}

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    /** @type {(Track | undefined)[]} */
    this.tracks = [];
    this.selected = 0;
    this.position = 0; // context frames
    this.playing = false;
    this.ready = false; // enough is buffered to go on
    this.level = 0; // of the fade at play, pause and seek
    /** @type {number | null} */
    this.seeking = null; // where to, once the sound has faded out
    this.seeks = 0; // as of the last one
    /** @type {[number, number] | null} */
    this.loop = null; // context frames
    this.underruns = 0;
    this.reported = 0;
    this.weights = new Float32Array(128);
    this.port.onmessage = ({ data }) => this.receive(data);
  }

  /** @param {any} message see `Sound.post` */
  receive(message) {
    const { op, track: number = this.selected, value } = message;
    const track = this.tracks[number];
    if (op === 'open') {
      this.tracks[number] = new Track(message.rate, message.channels);
      this.tracks[number].share = number === this.selected ? 1 : 0;
    } else if (op === 'close') this.tracks[number] = undefined;
    else if (op === 'append') track?.append(value);
    else if (op === 'complete' && track) track.complete = true;
    else if (op === 'gain' && track) track.gain = value;
    else if (op === 'select') this.selected = value;
    else if (op === 'play') this.playing = value;
    else if (op === 'ready') this.ready = value;
    else if (op === 'seek') {
      this.seeking = Math.round(value * sampleRate);
      this.seeks = message.seeks;
    } else if (op === 'loop') this.loop = value && value.map((/** @type {number} */ s) => Math.round(s * sampleRate));
    if (op !== 'append') this.report();
  }

  report() {
    const track = this.tracks[this.selected];
    this.reported = currentTime;
    this.port.postMessage({
      position_s: (this.seeking ?? this.position) / sampleRate,
      time_s: currentTime,
      moving: this.playing && this.ready && this.seeking === null,
      playing: this.playing,
      ready: this.ready,
      received: track?.received ?? 0,
      underruns: this.underruns,
      seeks: this.seeks,
    });
  }

  /**
   * @param {Float32Array[][]} _
   * @param {Float32Array[][]} outputs
   */
  process(_, [out]) {
    const count = out[0].length;
    let done = 0;
    while (done < count) {
      const rendered = this.stretch(out, done, count - done);
      if (rendered === null) break;
      done += rendered;
    }
    if (currentTime - this.reported >= REPORT_S && (done || this.playing)) this.report();
    return true;
  }

  /**
   * Renders up to a loop's or the track's end; how many frames, null where the rest is silence.
   * @param {Float32Array[]} out
   * @param {number} at
   * @param {number} most
   */
  stretch(out, at, most) {
    const track = this.tracks[this.selected];
    const sounding = this.playing && this.ready && this.seeking === null;
    if (!this.level && this.seeking !== null) {
      this.position = Math.max(0, this.seeking);
      this.seeking = null;
      this.report();
      return 0;
    }
    if (!track || (!sounding && !this.level)) return null;
    if (sounding && !this.position) this.level = 1; // a beginning is not faded in
    const end = this.loop && this.position < this.loop[1] ? this.loop[1] : Infinity;
    const faded = sounding ? Infinity : Math.ceil(this.level * FADE_S * sampleRate);
    const count = Math.min(most, faded, end - this.position, track.end - this.position);
    if (count <= 0) return this.at_end(track);
    this.fade(at, count, sounding);
    for (const other of this.tracks) {
      if (!other) continue;
      const goal = other === track ? 1 : 0;
      if (!other.share && !goal) continue;
      const level = this.shared(other, goal, at, count);
      out.forEach((channel, side) => other.render(channel, level, side, this.position, at, count));
    }
    this.position += count;
    if (this.loop && this.position === this.loop[1]) this.position = this.loop[0];
    return count;
  }

  /**
   * @param {Track} track
   * @returns {0 | null} 0 where it goes on
   */
  at_end(track) {
    if (track.complete && this.loop && this.playing && track.end > 0) {
      this.position = this.loop[0] < track.end ? this.loop[0] : 0;
      return 0;
    }
    this.level = 0;
    if (!track.complete) {
      if (this.ready && this.playing) this.underruns += 1;
      this.ready = false;
    } else if (this.playing) {
      this.playing = false;
      this.port.postMessage({ ended: true });
    }
    this.report();
    return null;
  }

  /**
   * The fade at play, pause and seek, into `weights`.
   * @param {number} at
   * @param {number} count
   * @param {boolean} up
   */
  fade(at, count, up) {
    const step = (up ? 1 : -1) / (FADE_S * sampleRate);
    for (let i = at; i < at + count; i++) {
      this.weights[i] = this.level;
      this.level = Math.max(0, Math.min(1, this.level + step));
    }
  }

  /**
   * The weights of one track: the fade, its gain and its share.
   * @param {Track} track
   * @param {number} goal
   * @param {number} at
   * @param {number} count
   */
  shared(track, goal, at, count) {
    const level = new Float32Array(128);
    const step = (goal ? 1 : -1) / (SWITCH_S * sampleRate);
    for (let i = at; i < at + count; i++) {
      level[i] = this.weights[i] * track.share * track.gain;
      track.share = Math.max(0, Math.min(1, track.share + step));
    }
    return level;
  }
}

registerProcessor('musicgen-player', Player);
