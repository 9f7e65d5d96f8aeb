// @ts-check
// Buttons, keys, and the pointer on the player's picture: seek, loop a region, zoom, what lies under it.

import { RULER_PX } from './picture.js';

/** @typedef {import('./view.js').View} View */

const EDGE_PX = 10; // a loop's edge is caught from so far
const SHORTEST_S = 0.05; // of a loop
const TYPING = 'input, textarea, select, [contenteditable=true], [role=listbox], [role=option], '
  + '[role=tab], [role=radio], [role=combobox], .pad-field,'
  + ' .trim [role=slider]'; // these have keys of their own

/** @param {View} view */
export function listen_to_buttons(view) {
  const { sound } = view;
  /** @type {[string, () => void][]} */
  const clicks = [
    ['play', () => view.toggle()], ['float', () => view.toggle()], ['stop', () => view.stop()], ['loop', () => view.toggle_loop()],
    ['closer', () => view.zoom(2)], ['wider', () => view.zoom(0.5)],
    ['mute', () => { sound.set_volume(sound.level, !sound.muted); view.refresh(); }],
  ];
  for (const [name, act] of clicks) view.find(name).addEventListener('click', act);
  const volume = /** @type {HTMLInputElement} */ (view.find('volume'));
  volume.value = String(sound.level);
  volume.addEventListener('input', () => {
    sound.set_volume(Number(volume.value), false);
    view.refresh();
  });
  // Where the player is out of view, as on a phone, Play and Pause stay within reach.
  new IntersectionObserver(([{ isIntersecting }]) =>
    view.root.classList.toggle('is-out', !isIntersecting)).observe(view.find('foot'));
  // The click on Generate lets the clock run before the first sound comes.
  document.addEventListener('click', ({ target }) => {
    if (!(target instanceof Element)) return;
    if (target.closest('#generate')) sound.wake();
    if (target.closest('#stop')) sound.stop();
  }, true);
}

/** @param {View} view */
export function listen_to_pointer(view) {
  const { slider, picture, sound } = view;
  const place = (/** @type {PointerEvent | WheelEvent} */ { clientX, clientY }) => {
    const { left, top } = slider.getBoundingClientRect();
    return { x: clientX - left, y: clientY - top };
  };
  const time = (/** @type {number} */ x) =>
    Math.max(0, Math.min(view.duration_s, picture.time_at(x)));
  let anchor_s = 0; // the end of a region that stays

  slider.addEventListener('pointerdown', (event) => {
    if (event.button || !view.duration_s) return;
    const { x, y } = place(event), at_s = time(x);
    slider.setPointerCapture(event.pointerId);
    const edge = sound.loop?.findIndex((s) => Math.abs(picture.x_of(s) - x) < EDGE_PX) ?? -1;
    if (sound.loop && edge >= 0 && y < RULER_PX) {
      view.dragging = 'region';
      anchor_s = sound.loop[1 - edge];
    } else if (y < RULER_PX || event.shiftKey) {
      view.dragging = 'region';
      anchor_s = at_s;
    } else {
      view.dragging = 'seek';
      view.seek(at_s);
    }
  });
  slider.addEventListener('pointermove', (event) => {
    const { x, y } = place(event), at_s = time(x);
    if (view.dragging === 'seek') view.seek(at_s);
    if (view.dragging === 'region') {
      view.region = anchor_s < at_s ? [anchor_s, at_s] : [at_s, anchor_s];
      view.place();
    }
    point(view, x, y);
  });
  const end = () => {
    const { region, dragging } = view;
    view.dragging = '';
    view.region = null;
    if (dragging !== 'region') return;
    if (!region || region[1] - region[0] < SHORTEST_S) view.seek(anchor_s); // a click
    else {
      sound.set_loop(region);
      if (sound.position_s < region[0] || sound.position_s > region[1]) view.seek(region[0]);
    }
    view.refresh();
  };
  slider.addEventListener('pointerup', end);
  slider.addEventListener('pointercancel', () => {
    view.dragging = '';
    view.region = null;
    view.refresh();
  });
  slider.addEventListener('pointerleave', () => point(view, -1, -1));
  slider.addEventListener('wheel', (event) => {
    const { from_s, to_s } = picture.span;
    if (event.ctrlKey) view.zoom(2 ** (-event.deltaY / 200), time(place(event).x));
    else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      const moved_s = ((event.deltaX || event.deltaY) / picture.width) * (to_s - from_s);
      view.set_span(from_s + moved_s, to_s + moved_s);
    } else return;
    event.preventDefault();
  }, { passive: false });
}

/**
 * Says what lies under the pointer.
 * @param {View} view
 * @param {number} x outside: nothing
 * @param {number} y
 */
function point(view, x, y) {
  const { picture } = view, label = view.find('pointer');
  label.hidden = x < 0 || !view.duration_s;
  if (label.hidden) return;
  label.textContent = picture.at(view.shown, x, y);
  const left = x + 14 + label.offsetWidth < picture.width ? x + 12 : x - 12 - label.offsetWidth;
  label.style.transform = `translate(${left}px, ${Math.min(y + 14, picture.height - 24)}px)`;
}

/** @param {View} view */
export function listen_to_keys(view) {
  document.addEventListener('keydown', (event) => {
    const { target, key } = event;
    if (!(target instanceof Element)) return;
    if (key === 'Enter' && (event.ctrlKey || event.metaKey)) generate(event);
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (target.matches(TYPING) || target.closest('dialog, [role=dialog]')) return;
    const answer = answers(view, target, event.shiftKey ? 5 : 1)[key];
    if (!answer) return;
    event.preventDefault();
    answer();
  }, true);
}

/** @param {KeyboardEvent} event */
function generate(event) {
  const button = /** @type {HTMLButtonElement | null} */ (document.querySelector('#generate'));
  if (!button || button.disabled || !button.offsetParent) return;
  event.preventDefault();
  event.stopPropagation();
  button.click();
}

/**
 * What each key does.
 * @param {View} view
 * @param {Element} target what has the focus
 * @param {number} step_s of an arrow
 * @returns {Record<string, () => void>}
 */
function answers(view, target, step_s) {
  const { sound } = view;
  /** @type {Record<string, () => void>} */
  const keys = {
    Escape: () => view.stop(),
    ArrowLeft: () => view.seek(sound.position_s - step_s),
    ArrowRight: () => view.seek(sound.position_s + step_s),
  };
  if (!target.matches('button, a, summary, label')) keys[' '] = () => view.toggle();
  view.compare?.takes.forEach((_, index) => {
    keys[index + 1] = () => view.compare?.choose(index);
  });
  if (!view.root.contains(target)) return keys;
  return {
    ...keys,
    Home: () => view.seek(0),
    End: () => view.seek(view.duration_s),
    '+': () => view.zoom(2),
    '-': () => view.zoom(0.5),
    l: () => view.toggle_loop(),
  };
}
