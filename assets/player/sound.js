// @ts-check
// The sound of the page: one AudioContext, one playhead, up to four tracks under it.
//
// A track is fetched from the server, from where it stands, until it is complete: the music of a
// job while it is being made, or a take's WAV. `sound_worklet.js` holds the samples and plays them;
// this module says what to play, when enough is buffered, and keeps every other sound quiet.

import { Track } from './track.js';

/**
 * @typedef {import('./track.js').Source} Source
 * @typedef {{ position_s: number, time_s: number, moving: boolean, playing: boolean,
 *   ready: boolean, received: number, underruns: number, seeks: number }} Report of the audio thread
 */

const LEAD_S = 0.08; // buffered before anything plays
const BLOCKED_MS = 400; // until a clock that does not start is called held back
const REST_MS = 5000; // after a pause, until the clock rests: an idle page costs nothing
const SILENCE_S = 6; // browsers give media keys to nothing shorter than 5 s

export class Sound extends EventTarget {
  /** @param {string | URL} worklet the address of `sound_worklet.js` */
  constructor(worklet) {
    super();
    this.worklet = worklet;
    /** @type {AudioContext | null} */
    this.context = null;
    /** @type {AudioWorkletNode | null} */
    this.node = null;
    /** @type {GainNode | null} */
    this.gain = null;
    /** @type {[any, Transferable[]][]} */
    this.unsent = []; // until the audio thread is there
    /** @type {(Track | null)[]} */
    this.tracks = [null, null, null, null];
    this.gains_db = [0, 0, 0, 0];
    this.selected = 0;
    this.playing = false; // as the user asked
    this.blocked = false; // the browser does not let the clock run
    this.rest = 0; // the timer until it is suspended
    this.ready = false;
    /** @type {[number, number] | null} */
    this.loop = null; // seconds
    this.level = Number(localStorage.musicgenVolume ?? 0.9); // of the volume control, 0 to 1
    this.muted = false;
    /** @type {Report} */
    this.report = { position_s: 0, time_s: 0, moving: false, playing: false, ready: false,
      received: 0, underruns: 0, seeks: 0 };
    /** @type {HTMLMediaElement | null} */
    this.other = null; // what else sounded last on this page
    this.media = new Audio(); // silence: without a media element there are no media keys
    this.keep_others_quiet();
    this.answer_media_keys();
  }

  get track() {
    return this.tracks[this.selected];
  }

  get position_s() {
    const { moving, position_s, time_s } = this.report;
    if (!moving || this.context?.state !== 'running') return position_s;
    return position_s + Math.max(0, Math.min(0.25, this.context.currentTime - time_s));
  }

  /** Whether samples are being played now. */
  get moving() {
    return this.report.moving && this.context?.state === 'running';
  }

  /**
   * @param {any} message
   * @param {Transferable[]} transfer
   */
  post(message, transfer = []) {
    if (this.node) this.node.port.postMessage(message, transfer);
    else this.unsent.push([message, transfer]);
  }

  changed() {
    this.dispatchEvent(new Event('change'));
  }

  /** Starts the clock. A browser lets it run only from a gesture of the user on. */
  wake() {
    clearTimeout(this.rest);
    if (!this.context) {
      const context = (this.context = new AudioContext({ latencyHint: 'playback' }));
      const session = /** @type {any} */ (navigator).audioSession;
      if (session) session.type = 'playback'; // an iPhone's mute switch is for ringing
      this.gain = context.createGain();
      this.gain.connect(context.destination);
      this.set_volume();
      context.addEventListener('statechange', () => this.look_at_clock());
      context.audioWorklet.addModule(this.worklet).then(() => {
        const node = new AudioWorkletNode(context, 'musicgen-player', {
          numberOfInputs: 0, outputChannelCount: [2],
        });
        node.port.onmessage = ({ data }) => this.take_report(data);
        node.connect(/** @type {GainNode} */ (this.gain));
        this.node = node;
        for (const [message, transfer] of this.unsent.splice(0)) this.post(message, transfer);
      });
    }
    this.context.resume().catch(() => {});
    setTimeout(() => this.look_at_clock(), BLOCKED_MS);
  }

  look_at_clock() {
    const blocked = this.playing && this.context?.state !== 'running';
    if (blocked === this.blocked) return;
    this.blocked = blocked;
    this.changed();
  }

  /** @param {any} data */
  take_report(data) {
    if (data.ended) {
      if (!this.track?.complete) return;
      this.halt();
      this.dispatchEvent(new Event('ended'));
      return;
    }
    const { position_s, seeks, moving } = this.report;
    // The audio thread had not come to the last seek yet: where it was counts no more.
    const is_late = data.seeks !== seeks;
    this.report = is_late ? { ...data, position_s, seeks, moving: false } : data;
    const moved = this.report.moving !== moving;
    this.ready = data.ready;
    this.go_on();
    if (moved) this.changed();
  }

  /** Lets a track that waits go on once enough of it is buffered. */
  go_on() {
    const track = this.track;
    if (!track || !this.playing || this.ready || !this.is_enough(track)) return;
    this.ready = true;
    this.post({ op: 'ready', value: true });
  }

  /**
   * Slower than real time, a lead has to last to the end: with b seconds in hand of u that are
   * still to be played, the server keeps ahead while b >= u * (1 - speed).
   * @param {Track} track
   */
  is_enough(track) {
    if (track.complete) return true;
    const ahead_s = track.received_s - this.position_s;
    const { total_s, speed, last } = track.pace;
    if (ahead_s < LEAD_S) return false;
    if (last || speed >= 1) return true;
    if (!speed) return false;
    const left_s = Math.max(total_s - this.position_s, ahead_s);
    return ahead_s >= Math.min(left_s - 0.05, left_s * (1 - speed) * 1.1);
  }

  /**
   * Puts a piece of music into a place; what was there ends.
   * @param {number} number 0 to 3
   * @param {Source} source
   */
  open(number, source) {
    this.close(number);
    if (number === this.selected) this.hold();
    const track = new Track(source, {
      format: ({ rate, channels }) => {
        this.post({ op: 'open', track: number, rate, channels });
        this.set_gain(number, this.gains_db[number]);
      },
      samples: (track, pcm) => {
        this.dispatchEvent(new CustomEvent('samples', { detail: { track, pcm } }));
        this.post({ op: 'append', track: number, value: pcm }, [pcm.buffer]);
        this.go_on();
      },
      complete: () => {
        this.post({ op: 'complete', track: number });
        this.go_on();
        this.changed();
      },
      failed: () => this.changed(),
    });
    this.tracks[number] = track;
    return track;
  }

  /**
   * Goes on with another piece of music in the playing one's place, as soon as it is there.
   * @param {Source} source
   * @param {number} later_s what plays now lies so much later in it
   */
  hand_over(source, later_s) {
    const before = this.selected, number = before ? 0 : 1;
    const track = this.open(number, source);
    const look = () => {
      const off = this.tracks[number] !== track || this.selected !== before;
      const at_s = this.position_s + later_s;
      if (!off && !track.complete && track.received_s < at_s + 1) return;
      for (const name of ['samples', 'change']) this.removeEventListener(name, look);
      if (off) return;
      this.select(number);
      this.seek(at_s);
      this.close(before);
    };
    for (const name of ['samples', 'change']) this.addEventListener(name, look);
  }

  /** Not ready: the audio thread waits for the next `ready`. */
  hold() {
    this.ready = false;
    this.post({ op: 'ready', value: false });
  }

  /** @param {number} number */
  close(number) {
    this.tracks[number]?.stop.abort();
    this.gains_db[number] = 0;
    this.tracks[number] = null;
    this.post({ op: 'close', track: number });
  }

  play() {
    this.silence_others();
    this.playing = true;
    this.wake();
    const track = this.track;
    if (track?.complete && this.position_s >= track.received_s - 0.02) this.seek(0);
    this.post({ op: 'play', value: true });
    this.go_on();
    this.changed();
  }

  halt() {
    this.playing = false;
    this.post({ op: 'play', value: false });
    this.look_at_clock();
    clearTimeout(this.rest);
    this.rest = setTimeout(() => this.context?.suspend(), REST_MS);
    this.changed();
  }

  /** Silence at once, and back to the beginning. */
  stop() {
    this.halt();
    this.seek(0);
  }

  toggle() {
    if (this.playing) this.halt();
    else this.play();
  }

  /** @param {number} position_s */
  seek(position_s) {
    const track = this.track;
    const most_s = track?.source.live && !track.complete ? track.received_s - LEAD_S : Infinity;
    const clamped = Math.max(0, Math.min(position_s, most_s));
    const seeks = this.report.seeks + 1;
    this.report = { ...this.report, position_s: clamped, moving: false, seeks };
    this.post({ op: 'seek', value: clamped, seeks });
    this.changed();
  }

  /** @param {[number, number] | null} loop seconds */
  set_loop(loop) {
    this.loop = loop;
    this.post({ op: 'loop', value: loop });
    this.changed();
  }

  /**
   * Another track at the same place, without a gap.
   * @param {number} number
   */
  select(number) {
    if (!this.tracks[number] || number === this.selected) return;
    this.selected = number;
    this.post({ op: 'select', value: number });
    this.go_on();
    this.changed();
  }

  /**
   * A track's gain, so that takes are compared at one loudness.
   * @param {number} number
   * @param {number} gain_db
   */
  set_gain(number, gain_db) {
    this.gains_db[number] = gain_db;
    this.post({ op: 'gain', track: number, value: 10 ** (gain_db / 20) });
  }

  set_volume(level = this.level, muted = this.muted) {
    Object.assign(this, { level, muted });
    localStorage.musicgenVolume = level;
    const gain = muted ? 0 : level ** 2; // the ear hears ratios
    if (this.gain && this.context)
      this.gain.gain.setTargetAtTime(gain, this.context.currentTime, 0.01);
  }

  /** Starting any sound on the page stops every other. */
  keep_others_quiet() {
    const start = HTMLMediaElement.prototype.play;
    const started = (/** @type {HTMLMediaElement} */ media) => {
      if (media === this.media) return;
      if (this.playing) this.halt();
      if (this.other !== media) this.other?.pause();
      this.other = media;
    };
    // Gradio's waveforms play elements that are in no document, so their events reach nobody.
    HTMLMediaElement.prototype.play = function () {
      started(this);
      return start.call(this);
    };
    document.addEventListener('play', ({ target }) => {
      if (target instanceof HTMLMediaElement) started(target);
    }, true);
  }

  silence_others() {
    this.other?.pause();
    this.other = null;
  }

  /** Media keys, headphones and lock screens: they reach a page that plays a media element. */
  answer_media_keys() {
    const session = navigator.mediaSession;
    if (!session) return;
    const answers = {
      play: () => this.play(),
      pause: () => this.halt(),
      stop: () => this.stop(),
      seekbackward: () => this.seek(this.position_s - 5),
      seekforward: () => this.seek(this.position_s + 5),
      seekto: (/** @type {MediaSessionActionDetails} */ { seekTime }) => this.seek(seekTime ?? 0),
    };
    for (const [name, answer] of Object.entries(answers)) {
      try {
        session.setActionHandler(/** @type {MediaSessionAction} */ (name), answer);
      } catch { /* a browser that does not know this key */ }
    }
    this.media.loop = true;
    this.media.src = silence();
    this.addEventListener('change', () => {
      session.playbackState = this.playing ? 'playing' : 'paused';
      if (this.playing && this.media.paused) this.media.play().catch(() => {});
      else if (!this.playing) this.media.pause();
    });
  }

  /** @param {string} title what the system shows */
  set title(title) {
    if (navigator.mediaSession)
      navigator.mediaSession.metadata = new MediaMetadata({ title, artist: 'MusicGen UI' });
  }
}

/** A WAV of silence: 8,000 samples of 8 bits a second. */
function silence() {
  const bytes = new Uint8Array(44 + SILENCE_S * 8000).fill(128, 44);
  const view = new DataView(bytes.buffer);
  [...'RIFF....WAVEfmt ....................data'].forEach((c, i) => (bytes[i] = c.charCodeAt(0)));
  view.setUint32(4, bytes.length - 8, true);
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, 8000, true);
  view.setUint32(28, 8000, true);
  view.setUint16(32, 1, true);
  view.setUint16(34, 8, true);
  view.setUint32(40, bytes.length - 44, true);
  return URL.createObjectURL(new Blob([bytes], { type: 'audio/wav' }));
}
