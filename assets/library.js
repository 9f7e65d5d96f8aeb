// The library's cards: which button of which take was pressed goes to the server, what concerns the
// browser alone is done here. Runs once; Gradio hands in `element`, `trigger` and `watch`.
const player = () => window.musicgenPlayer;
const cards = () => [...element.querySelectorAll('.card')];
const selected = () =>
  [...element.querySelectorAll('.card-check input:checked')].map((box) => box.closest('.card').dataset.name);
const names_of = (node) => {
  const card = node.closest('.card');
  return card ? [card.dataset.name] : selected();
};

// Gradio writes a new list into the elements of the one before, so an element may stand for another
// take afterwards. What the user did with a take follows that take: its tick, what is typed into its
// title, an open menu, the focus. The focus of a card that has gone is at what followed it.
const CONTROLS = ['.card-play', '.card-title', '.card-star', '.card-more summary', '.card-check input'];
const ticked = new Set(); // names of takes
let typing = null; // { name, value, start, end } of the title that is being edited
let menu = ''; // the take whose menu is open
let focused = null; // { name, index, control } where the focus is, or was when the list changed
let redrawing = false;

const card_of = (name) => cards().find((card) => card.dataset.name === name);
const send = (act, names, value) => trigger('click', { act, names, value });
const note_focus = ({ target }) => {
  const all = cards(), card = all.find((each) => each.contains(target));
  const control = CONTROLS.find((each) => target.closest(each))
    ?? (target.closest('.card-menu') && '.card-more summary');
  focused = card && control ? { name: card.dataset.name, index: all.indexOf(card), control } : null;
};
const put_back = () => {
  redrawing = true;
  const all = cards(), names = all.map((card) => card.dataset.name);
  for (const name of ticked) if (!names.includes(name)) ticked.delete(name);
  if (!names.includes(menu)) menu = '';
  for (const card of all) {
    const { name } = card.dataset, title = card.querySelector('.card-title');
    card.querySelector('.card-check input').checked = ticked.has(name);
    card.querySelector('details').open = name === menu;
    title.value = typing?.name === name ? typing.value : title.defaultValue;
  }
  focus_again();
  redrawing = false;
};
const focus_again = () => {
  const at = document.activeElement;
  if (!focused || (at && at !== document.body && !element.contains(at))) return;
  const found = card_of(focused.name)?.querySelector(focused.control)
    ?? element.querySelector('.library-said button')
    ?? cards()[focused.index]?.querySelector(focused.control)
    ?? element.querySelector('.library-pages button:enabled');
  if (!found || found === at) return;
  found.focus({ preventScroll: true });
  if (typing && found.matches('.card-title')) found.setSelectionRange(typing.start, typing.end);
};

// The card of the take in the player looks like it.
const mark = () => {
  const { take, sound, root } = player();
  for (const card of cards()) {
    const on = card.dataset.name === take?.id;
    const play = card.querySelector('.card-play'), title = card.querySelector('.card-title').defaultValue;
    const playing = on && root.classList.contains('is-playing');
    card.classList.toggle('is-current', on);
    card.classList.toggle('is-playing', playing);
    play.setAttribute('aria-label', `${playing ? 'Pause' : 'Play'} ${title}`);
  }
};
const begin = () => {
  if (!player()) return setTimeout(begin, 100);
  player().sound.addEventListener('change', mark);
  mark();
};
begin();

const count = () => {
  const names = selected(), bar = element.querySelector('.library-selection');
  if (!bar) return;
  bar.hidden = !names.length;
  bar.querySelector('.library-count').textContent = `${names.length} selected`;
  bar.querySelector('[data-act=compare]').disabled = names.length < 2 || names.length > 4;
};
watch('value', () => {
  put_back();
  count();
  if (player()) mark();
});

const save = (names, ending) => {
  const query = new URLSearchParams(names.map((name) => ['name', name]));
  query.set('ending', ending);
  Object.assign(document.createElement('a'), { href: `takes.zip?${query}`, download: 'takes.zip' }).click();
};

element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
  if (!button) return;
  const { act, value, back } = button.dataset, names = names_of(button);
  note_focus(event); // not every browser gives it to a button that is pressed
  button.closest('details')?.removeAttribute('open');
  if (act === 'open' && player().take?.id === names[0]) return player().toggle();
  if (act === 'open') player().play_next(names[0]);
  if (act === 'zip') return save(names, element.querySelector('.library-selection select').value);
  if (act === 'star') return send(act, names, button.getAttribute('aria-pressed') !== 'true');
  send(act, back ? [] : names, value);
});
element.addEventListener('change', ({ target }) => {
  if (!target.matches('.card-check input')) return;
  ticked[target.checked ? 'add' : 'delete'](names_of(target)[0]);
  count();
});
element.addEventListener('toggle', ({ target }) => {
  const [name] = names_of(target);
  if (target.open) menu = name;
  else if (menu === name) menu = '';
}, true); // it does not bubble
const note_typing = ({ target }) => {
  if (!target.matches('.card-title') || target.value === target.defaultValue) return;
  const { value, selectionStart, selectionEnd } = target;
  typing = { name: names_of(target)[0], value, start: selectionStart, end: selectionEnd };
};
for (const event of ['input', 'keyup', 'pointerup']) element.addEventListener(event, note_typing);
element.addEventListener('focusout', ({ target }) => {
  if (redrawing || !target.matches('.card-title')) return;
  if (target.value !== target.defaultValue) send('rename', names_of(target), target.value);
  typing = null;
});
element.addEventListener('keydown', (event) => {
  if (event.target.matches('.card-title')) {
    if (event.key === 'Escape') event.target.value = event.target.defaultValue;
    if (event.key === 'Escape' || event.key === 'Enter') event.target.blur();
  } else if (event.key === 'Escape' && event.target.closest('details[open]')) {
    const opened = event.target.closest('details');
    opened.removeAttribute('open');
    opened.querySelector('summary').focus();
    event.stopPropagation();
  }
});
document.addEventListener('focusin', note_focus);
document.addEventListener('pointerdown', note_focus, true); // it may take the focus away
document.addEventListener('click', ({ target }) => {
  for (const other of element.querySelectorAll('details[open]'))
    if (!other.contains(target)) other.removeAttribute('open');
});
