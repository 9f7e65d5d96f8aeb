// @ts-check
// Live mode's pad: a point between up to four prompts, and how much of each that is. Two prompts lie
// on a line, three in a triangle, four in a square. The markup is that of `ui/live_panel.py`.

/** @typedef {[x: number, y: number]} Point of the unit square, from the top left */

const STEP = 0.05, FINE = 0.01; // of an arrow key
/** @type {Point[][]} by the number of prompts */
const CORNERS = [
  [], [[0.5, 0.5]], [[0, 0.5], [1, 0.5]], [[0.5, 0], [0, 1], [1, 1]],
  [[0, 0], [1, 0], [0, 1], [1, 1]],
];
const PROMPTS = 4;

/** @param {number} value */
const unit = (value) => Math.max(0, Math.min(1, value));

/**
 * The weights of a point; they sum to 1. A point outside a triangle counts as the nearest in its row.
 * @param {number} count of prompts
 * @param {Point} point
 */
export function mix(count, [x, y]) {
  [x, y] = [unit(x), unit(y)];
  if (count === 4) return [(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y];
  if (count === 3) {
    const right = Math.max(0, Math.min(y, x - (1 - y) / 2));
    return [1 - y, y - right, right];
  }
  return count === 2 ? [1 - x, x] : [1].slice(0, count);
}

/**
 * Where weights lie.
 * @param {number[]} weights
 * @returns {Point}
 */
export function place(weights) {
  const corners = CORNERS[weights.length];
  const along = (/** @type {0 | 1} */ axis) => weights.reduce((sum, w, i) => sum + w * corners[i][axis], 0);
  return weights.length ? [along(0), along(1)] : [0.5, 0.5];
}

/**
 * Whole percent that sum to 100.
 * @param {number[]} weights
 */
export function percent(weights) {
  const whole = weights.map((w) => Math.floor(100 * w + 1e-9));
  const by_rest = weights.map((w, i) => i).sort((a, b) =>
    100 * (weights[b] - weights[a]) - (whole[b] - whole[a]));
  const left = weights.length ? 100 - whole.reduce((sum, w) => sum + w, 0) : 0;
  for (const i of by_rest.slice(0, left)) whole[i] += 1;
  return whole;
}

export class Pad {
  /**
   * @param {HTMLElement} root
   * @param {(weights: number[]) => void} changed gets the weight of each of the four prompts
   */
  constructor(root, changed) {
    this.field = /** @type {HTMLElement} */ (root.querySelector('.pad-field'));
    this.changed = changed;
    /** @type {Point} */
    this.point = [0.5, 0.5];
    /** @type {{ words: string, number: number }[]} */
    this.prompts = [];
    this.listen();
    this.read();
  }

  /** Reads the prompts that have words. */
  read() {
    const boxes = Array.from({ length: PROMPTS }, (_, i) =>
      /** @type {HTMLTextAreaElement | null} */ (document.querySelector(`#live_prompt_${i + 1} textarea`)));
    const before = this.prompts.length;
    this.prompts = boxes.flatMap((box, number) => (box?.value.trim() ? { words: box.value.trim(), number } : []));
    if (this.prompts.length !== before) this.point = place(this.prompts.map(() => 1 / this.prompts.length));
    this.show();
    if (this.prompts.length !== before) this.tell();
  }

  /** @param {Point} point */
  move([x, y]) {
    const count = this.prompts.length;
    this.point = place(mix(count, [x, y]));
    this.show();
    this.tell();
  }

  tell() {
    const weights = Array(PROMPTS).fill(0), whole = percent(mix(this.prompts.length, this.point));
    this.prompts.forEach(({ number }, i) => (weights[number] = whole[i] / 100));
    this.changed(weights);
  }

  show() {
    const { field, prompts, point } = this, count = prompts.length;
    const whole = percent(mix(count, point)), corners = CORNERS[count];
    field.querySelectorAll('.pad-corner').forEach((label, i) => {
      const shown = /** @type {HTMLElement} */ (label);
      shown.hidden = i >= count;
      if (shown.hidden) return;
      /** @type {HTMLElement} */ (shown.firstElementChild).textContent = prompts[i].words;
      /** @type {HTMLElement} */ (shown.lastElementChild).textContent = `${whole[i]} %`;
      const [x, y] = corners[i];
      Object.assign(shown.dataset, { x: String(x), y: String(y) });
    });
    const points = corners.map(([x, y]) => `${100 * x},${100 * y}`);
    if (count === 4) points.splice(2, 2, points[3], points[2]); // round the square
    field.querySelector('polygon')?.setAttribute('points', points.join(' '));
    const mark = /** @type {HTMLElement} */ (field.querySelector('.pad-point'));
    mark.style.left = `${100 * point[0]}%`;
    mark.style.top = `${100 * point[1]}%`;
    const words = prompts.map((prompt, i) => `${prompt.words} ${whole[i]} %`).join(', ');
    field.setAttribute('aria-valuetext', words || 'no prompt');
    field.setAttribute('aria-valuenow', String(Math.max(0, ...whole)));
  }

  listen() {
    const { field } = this;
    const follow = (/** @type {PointerEvent} */ { clientX, clientY }) => {
      const { left, top, width, height } = /** @type {HTMLElement} */ (field.firstElementChild)
        .getBoundingClientRect();
      this.move([(clientX - left) / width, (clientY - top) / height]);
    };
    field.addEventListener('pointerdown', (event) => {
      if (event.button) return;
      field.setPointerCapture(event.pointerId);
      follow(event);
    });
    field.addEventListener('pointermove', (event) => {
      if (field.hasPointerCapture(event.pointerId)) follow(event);
    });
    field.addEventListener('keydown', (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const [x, y] = this.point, step = event.shiftKey ? FINE : STEP, count = this.prompts.length;
      /** @type {Record<string, Point>} */
      const answers = {
        ArrowLeft: [x - step, y], ArrowRight: [x + step, y],
        ArrowUp: [x, y - step], ArrowDown: [x, y + step],
        Home: place(this.prompts.map(() => 1 / count)),
      };
      CORNERS[count].forEach((corner, i) => (answers[i + 1] = corner));
      if (!answers[event.key]) return;
      event.preventDefault();
      this.move(answers[event.key]);
    });
    document.addEventListener('input', ({ target }) => {
      if (target instanceof Element && target.closest('[id^=live_prompt_]')) this.read();
    });
  }
}
