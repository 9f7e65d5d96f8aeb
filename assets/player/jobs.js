// @ts-check
// The takes of this tab that are under way or just ended: a row each, with buttons of its own. The
// rows stay as long as their takes do, so that the focus stays too. When what was listened to has
// ended by itself, the next take under way is listened to.

/**
 * @typedef {import('./view.js').View} View
 * @typedef {{ job: string, take: string, title: string, text: string, share: number, stage: string,
 *   under_way: boolean }} Row `take`: the id of what was made; `share`: of its length, 0 to 1
 * @typedef {{ followed: string, rows: Row[] }} Jobs `followed`: the job that the player shows
 * @typedef {(act: 'show' | 'stop' | 'dismiss', job: string) => void} Act
 */

const ROW = `<button type="button" class="job-show"><svg viewBox="0 0 24 24" aria-hidden="true"><path
    d="M8 5v14l11-7z"/></svg></button>
  <span class="job-words"><b class="job-title" dir="auto"></b> <span class="job-text"></span></span>
  <button type="button" class="job-end"></button><span class="job-bar"><i></i></span>`;

export class JobList {
  /**
   * @param {View} view
   * @param {HTMLElement} root
   * @param {Act} act
   */
  constructor(view, root, act) {
    this.view = view;
    this.root = root;
    this.act = act;
    this.list = /** @type {HTMLElement} */ (root.querySelector('.job-list'));
    /** @type {Jobs} */
    this.jobs = { followed: '', rows: [] };
    this.heard_out = false; // what was listened to has ended by itself
    view.sound.addEventListener('ended', () => {
      this.heard_out = true;
      this.go_on();
    });
    view.sound.addEventListener('change', () => {
      if (view.sound.playing) this.heard_out = false;
    });
  }

  /** @param {Jobs | null} jobs from the server */
  show(jobs) {
    const before = new Map(this.jobs.rows.map((row) => [row.job, row]));
    this.jobs = jobs?.rows ? jobs : { followed: '', rows: [] };
    const { rows, followed } = this.jobs;
    // A single take under way is in the player already.
    this.root.hidden = rows.every(({ job }) => job === followed);
    const items = new Map([...this.list.children].map((item) =>
      [/** @type {HTMLElement} */ (item).dataset.job, /** @type {HTMLElement} */ (item)]));
    for (const row of rows) {
      const item = items.get(row.job) ?? this.made(row.job);
      this.fill(item, row);
      items.delete(row.job);
      const was = before.get(row.job);
      if (was?.under_way && !row.under_way && row.job !== followed) this.say(`${row.title}: ${row.text}`);
    }
    for (const item of items.values()) this.remove(item);
    this.go_on();
  }

  /** @param {string} job */
  made(job) {
    const item = document.createElement('li');
    item.className = 'job';
    item.dataset.job = job;
    item.innerHTML = ROW;
    const [show, end] = item.querySelectorAll('button');
    show.addEventListener('click', () => this.listen(job));
    end.addEventListener('click', () => {
      const row = this.row(job);
      if (row?.under_way && this.view.streaming === job) this.view.sound.stop();
      this.act(row?.under_way ? 'stop' : 'dismiss', job);
    });
    this.list.append(item);
    return item;
  }

  /** @param {string} job */
  row(job) {
    return this.jobs.rows.find((row) => row.job === job);
  }

  /**
   * @param {HTMLElement} item
   * @param {Row} row
   */
  fill(item, row) {
    const [show, end] = item.querySelectorAll('button');
    const { title, text, stage, under_way } = row, followed = row.job === this.jobs.followed;
    item.dataset.stage = stage;
    item.classList.toggle('is-followed', followed);
    set_text(item, '.job-title', title);
    set_text(item, '.job-text', text);
    show.hidden = !under_way && !row.take;
    show.setAttribute('aria-label', `${under_way ? 'Listen to' : 'Play'} ${title}`);
    if (under_way) show.setAttribute('aria-pressed', String(followed));
    else show.removeAttribute('aria-pressed');
    const words = !under_way ? 'Close' : stage === 'composing' ? 'Stop' : 'Cancel';
    if (end.textContent !== words) end.textContent = words;
    end.setAttribute('aria-label', `${words} ${title}`);
    /** @type {HTMLElement} */ (item.querySelector('.job-bar')).hidden = !under_way;
    /** @type {HTMLElement} */ (item.querySelector('i')).style.transform = `scaleX(${row.share})`;
  }

  /** @param {HTMLElement} item */
  remove(item) {
    const next = item.nextElementSibling ?? item.previousElementSibling;
    const focused = item.contains(document.activeElement);
    item.remove();
    if (!focused) return;
    const button = this.root.hidden ? null : next?.querySelector('button:last-of-type');
    /** @type {HTMLElement | null} */ (button ?? document.querySelector('#generate'))?.focus();
  }

  /** @param {string} job */
  listen(job) {
    const row = this.row(job);
    if (row?.take) this.view.play_next(row.take);
    else this.view.sound.wake(); // a browser wants a gesture for sound
    this.act('show', job);
  }

  /** To the next take under way, once the last one was listened to. */
  go_on() {
    const { followed, rows } = this.jobs;
    // Not before the player has its take: until then it is still the job's stream.
    if (!this.heard_out || this.view.streaming || this.row(followed)?.under_way) return;
    const next = rows.find((row) => row.under_way && row.stage === 'composing');
    if (!next) return;
    this.heard_out = false;
    this.act('show', next.job);
  }

  /** @param {string} text to screen readers */
  say(text) {
    set_text(this.root, '.job-said', text);
  }
}

/**
 * @param {HTMLElement} root
 * @param {string} selector
 * @param {string} text
 */
function set_text(root, selector, text) {
  const found = /** @type {HTMLElement} */ (root.querySelector(selector));
  if (found.textContent !== text) found.textContent = text;
}
