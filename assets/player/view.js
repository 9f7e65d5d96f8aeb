// @ts-check
// The player as it is seen and touched: what the server says of a job, the take on show, the
// picture with its playhead, buttons, keys. The markup is that of `ui/player.py`.

import { Picture, add_peaks, bytes_of, clock, no_peaks, nothing, read_peaks } from './picture.js';
import { listen_to_buttons, listen_to_keys, listen_to_pointer } from './controls.js';
import { Sound } from './sound.js';
import { Spectrogram } from './spectrum.js';

/**
 * @typedef {import('./picture.js').Shown} Shown
 * @typedef {import('./track.js').Track} Track
 * @typedef {{ job: string, session: string, stage: string, text: string, done_s: number,
 *   total_s: number, speed: number, endless: boolean, last: boolean }} State of a job, from the server
 * @typedef {{ url: string } | null} File
 * @typedef {{ id: string, job: string, as_streamed: boolean, title: string, wav: File,
 *   duration_s: number, prompt_s: number, context_s: number, sections: [number, string][],
 *   chords: import('./picture.js').Chord[],
 *   picture: File, edges: import('./picture.js').Edges | null, alt: string,
 *   peaks: string, peak_s: number, melody: string, melody_s: number, tempo_bpm: number,
 *   beats_a_bar: number }} Take from the server
 */

const CLOSEST_S = 0.5; // the shortest time that fills the width
const ENDLESS_S = 20; // of an endless piece in view
const BLOCKED = 'The browser holds the sound back. Press Play; if it stays silent, check that a '
  + 'loudspeaker is connected.';
const FAILED = 'The sound could not be loaded. Load the page again.';

/** @type {(view: View) => void} */
let arrive = () => {};
/** The page's player, once it is there. @type {Promise<View>} */
export const mounted = new Promise((done) => (arrive = done));

/** @param {HTMLElement} root */
export function mount(root) {
  const view = new View(root, new Sound(new URL('sound_worklet.js', import.meta.url)));
  Object.assign(window, { musicgenPlayer: view });
  arrive(view);
}

export class View {
  /**
   * @param {HTMLElement} root
   * @param {Sound} sound
   */
  constructor(root, sound) {
    this.root = root;
    this.sound = sound;
    this.slider = this.find('picture');
    this.picture = new Picture(/** @type {HTMLCanvasElement} */ (root.querySelector('canvas')));
    /** @type {State | null} */
    this.state = null;
    /** @type {Take | null} */
    this.take = null;
    this.streaming = ''; // the job whose sound is in the player
    this.source = ''; // the take's file, until it is played for the first time
    this.said = ''; // to screen readers
    this.left = ''; // the job from whose sound the page went on
    this.next = ''; // the take that is played once it is here
    this.told = ''; // the take that the server has told of last
    /** @type {import('./compare.js').Compare | null} */
    this.compare = null;
    this.ticking = false;
    this.drawing = 0;
    /** @type {'' | 'seek' | 'region'} */
    this.dragging = '';
    /** @type {[number, number] | null} */
    this.region = null; // while it is dragged
    /** @type {Shown} */
    this.shown = nothing();
    /** @type {Spectrogram | null} */
    this.arriving = null; // the picture of what comes while it is being made
    sound.addEventListener('change', () => this.refresh());
    sound.addEventListener('samples', (event) => {
      const { track, pcm } = /** @type {CustomEvent} */ (event).detail;
      if ((this.streaming || this.arriving) && track === sound.track) this.add(track, pcm);
    });
    new ResizeObserver(() => this.draw()).observe(this.slider);
    for (const listen of [listen_to_buttons, listen_to_pointer, listen_to_keys]) listen(this);
    this.refresh();
  }

  /**
   * @param {string} name
   * @returns {HTMLElement}
   */
  find(name) {
    return /** @type {HTMLElement} */ (this.root.querySelector(`.player-${name}`));
  }

  // What the server says

  /** @param {State | null} state */
  show_state(state) {
    if (!state?.stage) return;
    this.state = state;
    this.root.dataset.stage = state.stage;
    this.find('text').textContent = state.text;
    const done = Math.min(1, state.done_s / state.total_s) || 0;
    this.find('bar').setAttribute('aria-valuenow', String(Math.round(100 * done)));
    /** @type {HTMLElement} */ (this.find('bar').firstElementChild).style.transform = `scaleX(${done})`;
    // Screen readers hear each stage and each third of the way, not every update.
    const milestone = state.stage + Math.floor(done * 3) + (state.last ? 'end' : '');
    if (milestone !== this.said) this.find('said').textContent = state.text;
    this.said = milestone;
    if (state.job && state.stage === 'composing' && state.job !== this.streaming && !this.is_over(state.job))
      this.stream(state);
    if (this.streaming === state.job && this.sound.track) {
      this.sound.track.pace = state;
      if (!this.take) this.shown.duration_s = Math.max(state.total_s, this.sound.track.received_s);
      this.sound.go_on();
    }
    this.refresh();
  }

  /**
   * Whether the page went on from a job to something else.
   * @param {string} job
   */
  is_over(job) {
    return this.take?.job === job || this.left === job;
  }

  /** Whether something else plays, to which the page went on from the job that it followed. */
  get is_elsewhere() {
    return this.sound.playing && Boolean(this.left) && this.left === this.state?.job;
  }

  /**
   * Plays a job's music while it is being made.
   * @param {State} state
   */
  stream({ job, session, total_s }) {
    this.sound.stop();
    this.sound.set_loop(null);
    this.streaming = job;
    this.left = '';
    this.take = null;
    this.source = '';
    this.arriving = null;
    this.show(nothing(total_s));
    this.sound.open(this.sound.selected, { url: `jobs/${job}/audio`, session, live: true });
    this.sound.play();
  }

  /** @param {Take | null} take */
  show_take(take) {
    if (!take?.id || this.compare?.is_overtaken(take.id)) return;
    const known = take.id === this.take?.id;
    // More of a take, such as its picture, from which the page has gone on to a job.
    const late = !known && take.id === this.told && this.next !== take.id;
    this.told = take.id;
    if (late) return;
    const of_stream = Boolean(take.job) && take.job === this.streaming;
    this.take = take;
    if (!known) {
      this.sound.title = take.title;
      const url = take.wav?.url ?? '';
      if ((of_stream && take.as_streamed) || this.compare?.holds(take.id)) this.source = '';
      else if (of_stream && this.sound.playing && url) this.sound.hand_over({ url }, take.prompt_s);
      else { // another take than was heard where that was unusable: it plays from its beginning
        const goes_on = this.streaming && this.streaming === this.state?.job && this.state.last && this.sound.playing;
        this.put(url);
        if (goes_on) this.toggle();
      }
    }
    if (!known && !(of_stream && take.as_streamed)) this.left = this.streaming;
    if (!known) this.streaming = '';
    const same = known || (of_stream && take.as_streamed);
    if (!same) this.arriving = null;
    const peaks = take.peaks ? read_peaks(take) : known || of_stream ? this.shown.peaks : no_peaks();
    const melody = take.melody
      ? { classes: bytes_of(take.melody), column_s: take.melody_s } : null;
    this.show({ duration_s: take.duration_s, prompt_s: take.prompt_s, context_s: take.context_s,
      chords: take.chords, sections: take.sections, peaks, image: null, edges: null, melody }, same);
    this.find('alt').textContent = take.alt;
    if (take.picture) this.load_picture(take);
    if (this.next === take.id && !this.sound.playing) this.toggle();
    if (this.next === take.id) this.next = '';
    if (!known) this.sound.changed(); // for who marks what plays, such as the library
  }

  /**
   * Another take is on its way and will sound at once.
   * @param {string} id
   */
  play_next(id) {
    this.sound.halt();
    this.sound.wake();
    this.next = id;
  }

  /**
   * Another take: it is loaded when it is played.
   * @param {string} url
   */
  put(url) {
    this.sound.set_loop(null);
    this.sound.stop();
    this.sound.close(this.sound.selected);
    this.source = url;
  }

  /** @param {Take} take */
  load_picture(take) {
    const image = new Image();
    image.onload = () => {
      if (this.take?.id !== take.id) return;
      Object.assign(this.shown, { image, edges: take.edges });
      this.arriving = null;
      this.draw();
    };
    image.src = /** @type {{ url: string }} */ (take.picture).url;
  }

  /**
   * @param {Shown} shown
   * @param {boolean} same whether it is more of the same take
   */
  show(shown, same = false) {
    const { image, edges } = same ? this.shown : shown; // until the other picture is here
    this.shown = { ...shown, image, edges };
    if (!same) this.set_span(0, this.endless ? ENDLESS_S : shown.duration_s);
    this.refresh();
    this.draw();
  }

  /**
   * Waveform and spectrogram of what comes while it is being made.
   * @param {Track} track
   * @param {Int16Array} pcm
   */
  add({ rate, channels, received }, pcm) {
    const { shown } = this;
    add_peaks(shown.peaks, pcm, received, channels, Math.round(shown.peaks.column_s * rate));
    this.arriving ??= new Spectrogram(rate, channels, this.endless ? Infinity : shown.duration_s);
    this.arriving.add(pcm);
    this.draw();
  }

  // What is seen

  get duration_s() {
    return Math.max(this.shown.duration_s, this.sound.track?.received_s ?? 0);
  }

  /** Whether the piece that is being made has no end. */
  get endless() {
    return Boolean(this.streaming && this.state?.endless);
  }

  draw() {
    if (this.drawing) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = 0;
      if (this.arriving) {
        if (this.arriving.work()) this.draw();
        Object.assign(this.shown, { image: this.arriving.canvas, edges: this.arriving.edges });
      }
      this.picture.draw(this.shown);
      this.place();
    });
  }

  /**
   * @param {number} from_s
   * @param {number} to_s
   */
  set_span(from_s, to_s) {
    const all = Math.max(this.duration_s, this.endless ? ENDLESS_S : 0.1);
    const length = Math.min(all, Math.max(CLOSEST_S, to_s - from_s));
    const start = Math.max(0, Math.min(from_s, all - length));
    this.picture.span = { from_s: start, to_s: start + length };
    /** @type {HTMLButtonElement} */ (this.find('wider')).disabled = length >= all;
    this.draw();
  }

  /**
   * @param {number} factor above 1 is closer
   * @param {number} around_s stays where it is
   */
  zoom(factor, around_s = this.sound.position_s) {
    const { from_s, to_s } = this.picture.span;
    const share = Math.max(0, Math.min(1, (around_s - from_s) / (to_s - from_s)));
    const length = (to_s - from_s) / factor;
    this.set_span(around_s - share * length, around_s + (1 - share) * length);
  }

  /** Buttons, words and the slider, as things stand. */
  refresh() {
    const { sound } = this, playing = sound.playing && !sound.blocked;
    const play = this.find('play');
    for (const name of ['aria-label', 'title'])
      for (const button of [play, this.find('float')]) button.setAttribute(name, playing ? 'Pause' : 'Play');
    this.root.classList.toggle('is-playing', playing);
    const left_s = this.duration_s - sound.position_s;
    this.root.classList.toggle('is-begun', playing || (sound.position_s > 0 && left_s > 0.05));
    this.root.classList.toggle('is-live', this.endless);
    const silent = !sound.track && !this.source;
    /** @type {HTMLButtonElement} */ (play).disabled = silent;
    this.find('loop').setAttribute('aria-pressed', String(Boolean(sound.loop)));
    this.find('mute').setAttribute('aria-pressed', String(sound.muted));
    const hint = sound.track?.failed ? FAILED : sound.blocked ? BLOCKED : '';
    if (this.find('hint').textContent !== hint) this.find('hint').textContent = hint;
    this.find('hint').hidden = !hint;
    this.place();
    if (playing && !this.ticking) {
      this.ticking = true;
      requestAnimationFrame(() => this.tick());
    }
  }

  tick() {
    this.follow();
    this.place();
    this.ticking = this.sound.playing;
    if (this.ticking) requestAnimationFrame(() => this.tick());
  }

  /** Turns the page of a picture that is zoomed in. */
  follow() {
    const { from_s, to_s } = this.picture.span, at_s = this.sound.position_s;
    if (this.dragging || !this.sound.moving || (at_s >= from_s && at_s <= to_s)) return;
    this.set_span(at_s - 0.05 * (to_s - from_s), at_s + 0.95 * (to_s - from_s));
  }

  /** Playhead, loop and clock. */
  place() {
    const { sound, picture } = this, at_s = Math.min(sound.position_s, this.duration_s);
    const head = this.find('playhead'), x = picture.x_of(at_s);
    head.style.transform = `translateX(${x.toFixed(1)}px)`;
    head.hidden = !this.duration_s || x < -1 || x > picture.width + 1;
    const region = this.find('region'), loop = this.region ?? sound.loop;
    region.hidden = !loop;
    if (loop) {
      const left = picture.x_of(loop[0]);
      region.style.transform = `translateX(${left.toFixed(1)}px)`;
      region.style.width = `${(picture.x_of(loop[1]) - left).toFixed(1)}px`;
    }
    const text = `${clock(at_s)} of ${clock(this.duration_s)}`;
    if (this.slider.getAttribute('aria-valuetext') !== text) {
      this.slider.setAttribute('aria-valuetext', text);
      this.slider.setAttribute('aria-valuenow', at_s.toFixed(0));
      this.slider.setAttribute('aria-valuemax', this.duration_s.toFixed(0));
    }
    this.compare?.place();
    const time = `${clock(at_s, 1)} / ${clock(this.duration_s, 1)}`;
    if (this.find('clock').textContent !== time) this.find('clock').textContent = time;
  }

  // What is done

  /** The take's file is loaded when it is first needed. */
  load() {
    if (!this.source) return;
    const position_s = this.sound.position_s;
    this.sound.open(this.sound.selected, { url: this.source });
    this.sound.seek(position_s);
    this.source = '';
  }

  toggle() {
    this.load();
    if (this.sound.blocked) this.sound.play();
    else if (this.sound.track) this.sound.toggle();
  }

  /** Silence at once; what is being made ends, and stays as a take. */
  stop() {
    this.sound.stop();
    const button = /** @type {HTMLButtonElement | null} */ (document.querySelector('#stop'));
    if (button?.offsetParent && !button.disabled) button.click();
  }

  /** @param {number} position_s */
  seek(position_s) {
    this.sound.seek(Math.min(position_s, Math.max(0, this.duration_s - 0.01)));
    const { from_s, to_s } = this.picture.span, at_s = this.sound.position_s;
    if (at_s < from_s || at_s > to_s) this.set_span(at_s - (to_s - from_s) / 2, at_s + (to_s - from_s) / 2);
  }

  toggle_loop() {
    this.sound.set_loop(this.sound.loop ? null : [0, this.duration_s]);
  }

  /** @param {number} bars of the take, to hear how they repeat; 0: all of it, once */
  hear_loop(bars) {
    const { tempo_bpm = 0, beats_a_bar = 4, prompt_s = 0 } = this.take ?? {};
    const end_s = prompt_s + (60 * beats_a_bar * bars) / tempo_bpm;
    if (!bars) this.sound.set_loop(null);
    else if (tempo_bpm && end_s <= this.duration_s) this.sound.set_loop([prompt_s, end_s]);
  }
}
