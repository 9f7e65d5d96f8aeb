// @ts-check
// One piece of music on its way from the server, in order and without gaps: the sound of a job
// while it is being made, or a take's WAV. What breaks in between goes on where it stopped.

/**
 * @typedef {{ url: string, session?: string, live?: boolean }} Source `live`: a job's stream
 * @typedef {{ total_s: number, speed: number, last: boolean }} Pace how fast a job makes its music
 * @typedef {{ format(track: Track): void, samples(track: Track, pcm: Int16Array): void,
 *   complete(track: Track): void, failed(track: Track): void }} Receiver
 */

const RETRY_MS = 250, RETRY_MOST_MS = 4000;
const GONE = [400, 401, 403, 404]; // asking again is of no use

class GoneError extends Error {}

/** @param {number} ms */
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/**
 * Where the samples of a WAV begin.
 * @param {Uint8Array} bytes the file's beginning
 * @returns {{ rate: number, channels: number, start: number, size: number } | null} null: not here
 */
export function wav_format(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  let rate = 0, channels = 0;
  for (let at = 12; at + 8 <= bytes.length;) {
    const name = String.fromCharCode(...bytes.subarray(at, at + 4));
    const size = view.getUint32(at + 4, true);
    if (name === 'data') return { rate, channels, start: at + 8, size };
    if (name === 'fmt ') {
      if (at + 24 > bytes.length) return null;
      if (view.getUint16(at + 22, true) !== 16) throw new GoneError('16-bit samples are expected');
      [channels, rate] = [view.getUint16(at + 10, true), view.getUint32(at + 12, true)];
    }
    at += 8 + size + (size % 2);
  }
  return null;
}

/** Joins pieces of bytes and hands them on in whole frames. */
export class Frames {
  constructor() {
    this.rest = new Uint8Array(0);
  }

  /** @param {Uint8Array} piece */
  add(piece) {
    const joined = new Uint8Array(this.rest.length + piece.length);
    joined.set(this.rest);
    joined.set(piece, this.rest.length);
    this.rest = joined;
  }

  /**
   * @param {number} channels
   * @param {number} most bytes
   */
  take(channels, most = Infinity) {
    const bytes = Math.min(this.rest.length, most);
    const whole = bytes - (bytes % (2 * channels));
    const pcm = new Int16Array(this.rest.slice(0, whole).buffer);
    this.rest = this.rest.slice(whole);
    return pcm;
  }
}

export class Track {
  /**
   * @param {Source} source
   * @param {Receiver} receiver
   */
  constructor(source, receiver) {
    this.source = source;
    this.receiver = receiver;
    this.rate = 0; // Hz; 0 until the first samples are here
    this.channels = 0;
    this.received = 0; // frames
    this.lost = 0; // frames that the server left out: there are none
    this.header = 0; // bytes before a file's samples; 0 is not known yet
    this.size = 0; // bytes of a file's samples
    this.complete = false;
    this.failed = false;
    /** @type {Pace} */
    this.pace = { total_s: 0, speed: Infinity, last: true };
    this.stop = new AbortController();
    this.fetch_all();
  }

  get received_s() {
    return this.rate ? this.received / this.rate : 0;
  }

  async fetch_all() {
    const { signal } = this.stop;
    for (let wait = RETRY_MS; !this.complete && !signal.aborted;) {
      const before = this.received;
      try {
        await (this.source.live ? this.read_stream() : this.read_file());
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof GoneError) {
          this.failed = true;
          this.receiver.failed(this);
          return;
        }
        await pause(wait);
      }
      wait = this.received > before ? RETRY_MS : Math.min(2 * wait, RETRY_MOST_MS);
    }
  }

  /**
   * @param {string} url
   * @param {Record<string, string>} headers
   */
  async ask(url, headers) {
    const answer = await fetch(url, { headers, signal: this.stop.signal, cache: 'no-store' });
    if (GONE.includes(answer.status)) throw new GoneError(await answer.text());
    if (!answer.ok) throw Error(String(answer.status));
    return answer;
  }

  /** One response of a job's stream. */
  async read_stream() {
    const { url, session = '' } = this.source;
    const answer = await this.ask(`${url}?after=${this.received}`, { 'x-session': session });
    if (answer.status === 204) this.end();
    if (answer.status !== 200 || !answer.body) return;
    const [rate, channels, start] = ['x-sample-rate', 'x-channels', 'x-start'].map(
      (name) => Number(answer.headers.get(name)));
    this.lost += start - this.received;
    this.format(rate, channels);
    const frames = new Frames();
    for (const reader = answer.body.getReader();;) {
      const { done, value } = await reader.read();
      if (done) return;
      frames.add(value);
      this.append(frames.take(channels));
    }
  }

  /** A WAV, or the rest of it where the connection broke. */
  async read_file() {
    const from = this.header && this.header + 2 * this.channels * this.received;
    /** @type {Record<string, string>} */
    const headers = from ? { range: `bytes=${from}-` } : {};
    const answer = await this.ask(this.source.url, headers);
    if (!answer.body) return;
    const frames = new Frames();
    let skip = answer.status === 206 ? 0 : from; // not every server knows ranges
    for (const reader = answer.body.getReader();;) {
      const { done, value } = await reader.read();
      if (done) break;
      const skipped = Math.min(skip, value.length);
      skip -= skipped;
      frames.add(value.subarray(skipped));
      if (!this.header && !this.begin(frames)) continue;
      this.append(frames.take(this.channels, this.size - 2 * this.channels * this.received));
    }
    if (this.header && 2 * this.channels * this.received >= this.size) this.end();
    else throw Error('the file broke off');
  }

  /**
   * Reads a WAV's header; whether it was whole.
   * @param {Frames} frames
   */
  begin(frames) {
    const format = wav_format(frames.rest);
    if (!format) return false;
    this.header = format.start;
    this.size = format.size - (format.size % (2 * format.channels));
    frames.rest = frames.rest.slice(format.start);
    this.format(format.rate, format.channels);
    return true;
  }

  /**
   * @param {number} rate
   * @param {number} channels
   */
  format(rate, channels) {
    if (this.rate || this.stop.signal.aborted) return;
    Object.assign(this, { rate, channels });
    this.receiver.format(this);
  }

  /** @param {Int16Array} pcm whole frames, interleaved */
  append(pcm) {
    if (!pcm.length || this.stop.signal.aborted) return;
    this.received += pcm.length / this.channels;
    this.receiver.samples(this, pcm);
  }

  end() {
    if (this.stop.signal.aborted) return;
    this.complete = true;
    this.receiver.complete(this);
  }
}
