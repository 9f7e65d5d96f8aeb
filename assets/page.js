// What concerns the whole page: its notice, files dropped anywhere, numbers beyond a slider,
// uploads that fail, recording. Runs once, when the notice loads; Gradio hands in `element`,
// `props` and `watch`.
const root = element.querySelector('.notice');
const words = root.querySelector('.notice-words'), back = root.querySelector('.notice-undo');

// Shows a message, with a way back where there is one, until it is closed, another one comes, or a new take is asked for.
const say = (text, { items = [], wrong = false, undo = '' } = {}) => {
  words.replaceChildren();
  const line = Object.assign(document.createElement('p'), { textContent: text, dir: 'auto' });
  const list = document.createElement('ul');
  for (const item of items)
    list.append(Object.assign(document.createElement('li'), { textContent: item, dir: 'auto' }));
  root.hidden = !text;
  root.classList.toggle('is-wrong', wrong);
  if (text) words.append(line, ...(items.length ? [list] : []));
  back.hidden = !undo;
  back.dataset.undo = undo;
};
const close = () => say('');
watch('value', () => props.value && say(props.value.text, props.value));
root.querySelector('.notice-close').addEventListener('click', close);
back.addEventListener('click', () => {
  document.querySelector(`#undo_${back.dataset.undo}`).click();
  root.querySelector('.notice-close').focus(); // the button that had the focus goes
  say('Undone.');
});
// What settings are filled into is noted before: Undo gives it back.
const fills = '#offer, #use_settings, #preset_use, [data-act=settings]';
const note_form = () => (window.musicgenBefore = window.musicgenNow);
document.addEventListener('click', ({ target }) => {
  if (target.closest('#generate')) {
    refused = null;
    close();
  }
  if (target.closest(fills)) note_form();
}, true);
document.addEventListener('change', ({ target }) => {
  if (target.matches('input:has(+ #restore)')) note_form();
}, true);
document.addEventListener('keydown', (event) => event.key === 'Escape' && close());

// A number that was typed beyond a slider's end stays as it was typed, and Generate says what is
// wrong with it: Gradio's slider would put its end there without a word. An emptied one is put back.
let before = '';
const is_setting = (target) => target.matches?.('#compose input[type=number]');
document.addEventListener('focus', (event) => {
  if (is_setting(event.target)) before = event.target.value;
}, true);
document.addEventListener('blur', (event) => {
  const input = event.target;
  if (!is_setting(input)) return;
  if (!input.value) {
    input.value = before;
    input.dispatchEvent(new Event('input', { bubbles: true }));
  }
  const { rangeOverflow, rangeUnderflow } = input.validity;
  if (rangeOverflow || rangeUnderflow) event.stopImmediatePropagation();
}, true);

// A refused form says so at the field: bring that into view, out of its fold too. Gradio takes the
// sentence away with the answer to any event that reads the field: then the notice says it.
let wrong = null, refused = null;
const bring_into_view = (found) => {
  if (found !== wrong || !found.isConnected) return;
  if (!found.offsetParent) return requestAnimationFrame(() => bring_into_view(found)); // it opens
  found.closest('.block').querySelector('textarea, input')?.focus({ preventScroll: true });
  found.scrollIntoView({ block: 'center' });
};
const show_wrong = () => {
  const found = document.querySelector('#compose .validation-error');
  if (found === wrong) return;
  wrong = found;
  if (!found) {
    if (refused && refused.field.value === refused.value) say(refused.text, { wrong: true });
    refused = null;
    return;
  }
  const field = found.closest('.block').querySelector('textarea, input');
  refused = field && { field, value: field.value, text: found.textContent.trim() };
  if (!found.offsetParent) found.closest('.gr-accordion')?.querySelector('.label-wrap').click();
  bring_into_view(found);
};

// A field is tied to the words about it: its help, and why it was refused.
let described = 0;
const tie_help = () => {
  const of_block = new Map();
  for (const text of document.querySelectorAll('.block .info-text, .block .validation-error')) {
    const block = text.closest('.block');
    text.id ||= `about-${described++}`;
    of_block.set(block, `${of_block.get(block) ?? ''} ${text.id}`.trim());
  }
  for (const [block, ids] of of_block)
    for (const field of block.querySelectorAll('input, textarea'))
      if (field.getAttribute('aria-describedby') !== ids) field.setAttribute('aria-describedby', ids);
};

// Gradio names each radio button alone: with one name a choice is one stop of Tab, and arrows move
// in it. Chromium lets Tab stop at a list that scrolls, and an open list goes as soon as it is left.
// Its download buttons cannot be dragged.
const mend_gradio = () => {
  for (const radio of document.querySelectorAll('fieldset[id] input[name^=radio-]'))
    radio.name = radio.closest('fieldset').id;
  for (const list of document.querySelectorAll('[role=listbox]:not([tabindex])')) list.tabIndex = -1;
  for (const wav of document.querySelectorAll('#wav:not([draggable])')) {
    wav.draggable = true;
    wav.title = 'Click to download, or drag into a folder or another program';
  }
};
const look = () => {
  mend_gradio();
  tie_help();
  show_wrong();
};
look();
new MutationObserver(look).observe(document.body, { subtree: true, childList: true });

// A button that goes hands the focus to the one that takes its place, within a second or two.
const in_its_place = { get_start: '#get_cancel', get_cancel: '#get_start', get_later: '#prompt textarea' };
document.addEventListener('click', ({ target }) => {
  const next = in_its_place[target.closest('button')?.id];
  if (!next) return;
  const hand_over = (left) => {
    const found = document.querySelector(next);
    if (document.activeElement !== document.body) return left && setTimeout(hand_over, 100, left - 1);
    if (found?.offsetParent) found.focus({ preventScroll: true });
    else if (left) setTimeout(hand_over, 100, left - 1);
  };
  hand_over(20);
});

// Enter in the list of checkpoints takes what was typed, an id or a folder too. Gradio would take
// the first entry that contains it: here only one that is alone, or that an arrow key leads to.
let is_typed = false;
document.addEventListener('input', ({ target }) => {
  if (target.closest?.('#checkpoint')) is_typed = true;
}, true);
document.addEventListener('keydown', (event) => {
  const field = event.target.closest?.('#checkpoint input');
  if (!field) return;
  if (event.key.startsWith('Arrow')) is_typed = false;
  if (event.key !== 'Enter' || event.ctrlKey || event.metaKey || !is_typed) return;
  is_typed = false;
  if (document.querySelectorAll('#checkpoint [role=option]').length === 1) return;
  event.preventDefault();
  event.stopPropagation();
  field.blur(); // Gradio takes the text then
}, true);

// A file that is too large is told before it is sent.
const most_bytes = window.gradio_config?.max_file_size || Infinity;
const megabytes = (bytes) => `${Number((bytes / 1e6).toFixed(1))} MB`;
const is_too_large = (files) => {
  const large = [...files].find((file) => file.size > most_bytes);
  if (large)
    say(`“${large.name}” has ${megabytes(large.size)}, and this server takes ${
      megabytes(most_bytes)}: cut it, or save it as FLAC, MP3 or OGG.`, { wrong: true });
  return Boolean(large);
};
document.addEventListener('change', (event) => {
  const input = event.target;
  if (input.type !== 'file' || !input.files || !is_too_large(input.files)) return;
  event.stopImmediatePropagation();
  input.value = '';
}, true);

// Gradio shows "Error" alone for an upload that fails: say why, as far as it is known.
const plain_fetch = window.fetch;
window.fetch = async (...asked) => {
  const is_upload = /\/gradio_api\/upload(\?|$)/.test(asked[0]?.url ?? String(asked[0]));
  if (!is_upload) return plain_fetch(...asked);
  const failed = (why) => say(`The file could not be sent: ${why}`, { wrong: true });
  try {
    const answer = await plain_fetch(...asked);
    const type = answer.headers.get('content-type') || '';
    if (answer.status === 413) failed('it is larger than this server, or a proxy before it, takes.');
    else if (!answer.ok && type.startsWith('text/plain')) failed((await answer.clone().text()).slice(0, 300));
    else if (!answer.ok) failed(`the server answered ${answer.status}.`);
    return answer;
  } catch (error) {
    failed('the connection broke. Try again.');
    throw error;
  }
};

// A file may be dropped anywhere; without this the browser would leave the page and open it.
// Boxes that take files themselves keep their events, so only what they did not want comes here.
const has_files = (event) => [...(event.dataTransfer?.types ?? [])].includes('Files');
const mark = (on) => document.documentElement.classList.toggle('dropping', on);
document.addEventListener('dragover', (event) => {
  if (!has_files(event)) return;
  event.preventDefault();
  event.dataTransfer.dropEffect = 'copy';
  mark(true);
});
document.addEventListener('dragleave', (event) => event.relatedTarget || mark(false));
document.addEventListener('drop', (event) => {
  mark(false);
  if (!has_files(event)) return;
  if (event.target.closest?.('#audio_prompt, #melody, #style') && is_too_large(event.dataTransfer.files)) {
    event.preventDefault();
    event.stopImmediatePropagation();
  }
}, true);
document.addEventListener('drop', (event) => {
  if (!has_files(event)) return;
  event.preventDefault();
  const item = event.dataTransfer.items[0]?.webkitGetAsEntry?.();
  if (item?.isDirectory) return say('That is a folder: drop an audio file.', { wrong: true });
  const input = document.querySelector('input[type=file]:has(+ #dropped)');
  const one = new DataTransfer();
  one.items.add(event.dataTransfer.files[0]);
  input.files = one.files;
  input.dispatchEvent(new Event('change', { bubbles: true }));
  if (event.dataTransfer.files.length > 1) say('One file at a time: the first one is taken.');
});

// A take is dragged out of the page, into a folder or another program: by its waveform in the
// library, by a link to download, or by the player's WAV.
document.addEventListener('dragstart', (event) => {
  const { target, dataTransfer } = event;
  const link = target.closest?.('a[download]')
    ?? target.closest?.('.card-grip')?.closest('.card').querySelector('a[download]');
  const address = link?.href ?? (target.closest?.('#wav') && window.musicgenPlayer.take?.wav?.url);
  if (!address) return;
  const url = new URL(address, location.href);
  const name = link?.download || decodeURIComponent(url.pathname.split('/').pop());
  dataTransfer.setData('DownloadURL', `application/octet-stream:${name}:${url.href}`);
  dataTransfer.effectAllowed = 'copy';
});

// Browsers give a microphone to pages that come over https or from this computer alone.
document.documentElement.classList.toggle('no-microphone', !window.isSecureContext);
