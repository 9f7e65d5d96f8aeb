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

// The list is made anew by each answer: the focus goes back to where it was, or to what follows.
let last = null;
const send = (act, names, value) => {
  const all = cards().map((card) => card.dataset.name);
  last = { act, name: names[0], index: all.indexOf(names[0]) };
  trigger('click', { act, names, value });
};
const focus_again = () => {
  if (!last || (document.activeElement && document.activeElement !== document.body)) return;
  const card = cards().find((each) => each.dataset.name === last.name) ?? cards()[last.index];
  const found = element.querySelector('.library-said button')
    ?? card?.querySelector(`[data-act=${last.act}]:is(.card-star, .card-title, .card-play)`)
    ?? card?.querySelector('summary') ?? element.querySelector('.library-pages button:enabled');
  found?.focus({ preventScroll: true });
  last = null;
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
  count();
  focus_again();
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
  button.closest('details')?.removeAttribute('open');
  if (act === 'open' && player().take?.id === names[0]) return player().toggle();
  if (act === 'open') player().play_next(names[0]);
  if (act === 'zip') return save(names, element.querySelector('.library-selection select').value);
  if (act === 'star') return send(act, names, button.getAttribute('aria-pressed') !== 'true');
  send(act, back ? [] : names, value);
});
element.addEventListener('change', (event) => {
  if (event.target.matches('.card-title')) send('rename', names_of(event.target), event.target.value);
  if (event.target.matches('.card-check input')) count();
});
element.addEventListener('keydown', (event) => {
  if (event.target.matches('.card-title')) {
    if (event.key === 'Escape') event.target.value = event.target.defaultValue;
    if (event.key === 'Escape' || event.key === 'Enter') event.target.blur();
  } else if (event.key === 'Escape' && event.target.closest('details[open]')) {
    const menu = event.target.closest('details');
    menu.removeAttribute('open');
    menu.querySelector('summary').focus();
    event.stopPropagation();
  }
});
document.addEventListener('click', ({ target }) => {
  for (const menu of element.querySelectorAll('details[open]'))
    if (!menu.contains(target)) menu.removeAttribute('open');
});
