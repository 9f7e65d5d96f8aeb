// The live player: plays the chunks of a take on the Web Audio clock as they arrive.
// Runs once, when the component loads; Gradio hands in `element`, `props` and `watch`.
const find = (name) => element.querySelector('.live-' + name);
const root = element.querySelector('.live');
const player = {
  context: null, gain: null, analyser: null, // made in the first click, as browsers ask
  take: null, message: null, // what the server said last
  received: 0, waiting: [], // chunks: how many came; decoded ones that are not yet scheduled
  next: 0, scheduled_s: 0, buffered_s: 0, playing: false, sources: new Set(),
  underruns: 0, lost: 0, said: '',
};
window.musicgenLive = player;

// Wakes the audio clock; only a gesture of the user may do that.
player.wake = () => {
  if (!player.context) {
    player.context = new AudioContext({ latencyHint: 'playback' });
    player.gain = player.context.createGain();
    player.analyser = player.context.createAnalyser();
    player.analyser.fftSize = 1024;
    player.gain.connect(player.analyser).connect(player.context.destination);
    set_volume();
  }
  if (player.context.state === 'suspended') player.context.resume();
};

const set_volume = () => {
  const muted = find('mute').getAttribute('aria-pressed') === 'true';
  if (player.gain) {
    const level = muted ? 0 : Number(find('volume').value) ** 2; // the ear hears ratios
    player.gain.gain.setTargetAtTime(level, player.context.currentTime, 0.02);
  }
};

// A new take replaces the old one: what still sounds ends here.
const reset = (take) => {
  silence();
  Object.assign(player, {
    take, received: 0, waiting: [], next: 0, scheduled_s: 0, buffered_s: 0, playing: false,
  });
};

const silence = () => {
  for (const source of player.sources) source.stop();
  player.sources.clear();
  player.waiting = [];
  player.buffered_s = 0;
};
player.silence = silence;

const decode = (base64, channels, rate) => {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const pcm = new Int16Array(bytes.buffer);
  const buffer = player.context.createBuffer(channels, pcm.length / channels, rate);
  for (let channel = 0; channel < channels; channel++) {
    const samples = buffer.getChannelData(channel);
    for (let i = 0; i < samples.length; i++) samples[i] = pcm[i * channels + channel] / 32767;
  }
  return buffer;
};

const receive = (message) => {
  for (const [index, base64] of message.chunks) {
    if (index < player.received) continue;
    player.lost += index - player.received;
    player.received = index + 1;
    const buffer = decode(base64, message.channels, message.rate);
    player.waiting.push(buffer);
    player.buffered_s += buffer.duration;
  }
};

// Slower than real time, playing takes a lead that lasts to the end: with b seconds in hand of u
// that are still to be played, the server keeps ahead while b >= u * (1 - speed).
const ready = ({ total_s, speed, last }) => {
  if (!player.waiting.length) return false;
  if (last || speed >= 1) return true;
  if (!speed) return false;
  const unplayed_s = Math.max(total_s - player.scheduled_s, player.buffered_s);
  return player.buffered_s >= Math.min(unplayed_s, unplayed_s * (1 - speed) * 1.1);
};

const schedule = () => {
  const context = player.context;
  if (!player.playing) {
    if (!ready(player.message)) return;
    player.playing = true;
    player.next = context.currentTime + 0.06;
  }
  for (const buffer of player.waiting.splice(0)) {
    player.next = Math.max(player.next, context.currentTime + 0.02);
    const source = context.createBufferSource();
    source.buffer = buffer;
    source.connect(player.gain);
    source.onended = () => player.sources.delete(source);
    source.start(player.next);
    player.sources.add(source);
    player.next += buffer.duration;
    player.scheduled_s += buffer.duration;
  }
  player.buffered_s = 0;
};

const left_s = () =>
  player.playing ? Math.max(0, player.next - player.context.currentTime) : player.buffered_s;
player.heard_s = () => Math.max(0, player.scheduled_s - (player.playing ? left_s() : 0));

// The level of what sounds now, 0 to 1, on a scale of 48 dB.
player.level = () => {
  if (!player.analyser) return 0;
  const samples = new Float32Array(player.analyser.fftSize);
  player.analyser.getFloatTimeDomainData(samples);
  const power = samples.reduce((sum, x) => sum + x * x, 0) / samples.length;
  return Math.max(0, Math.min(1, 1 + Math.log10(power + 1e-12) / 4.8));
};

const show_clock = () => {
  const heard = player.heard_s(), left = left_s();
  const { total_s, last } = player.message;
  find('heard').style.transform = `scaleX(${Math.min(1, heard / total_s)})`;
  const level = player.playing && left > 0 ? player.level() : 0;
  find('meter').firstElementChild.style.transform = `scaleX(${level.toFixed(3)})`;
  let text = '';
  if (player.playing && left > 0)
    text = `heard ${heard.toFixed(1)} s · ${left.toFixed(1)} s ahead`;
  else if (player.buffered_s) text = `buffered ${player.buffered_s.toFixed(1)} s`;
  else if (player.received && last) text = `heard ${heard.toFixed(1)} s`;
  if (find('clock').textContent !== text) find('clock').textContent = text;
};

const tick = () => {
  if (player.playing && player.next < player.context.currentTime) {
    // Ran dry: gather a lead again, unless that was all.
    if (player.scheduled_s < player.message.total_s - 0.05 && !player.message.last)
      player.underruns += 1;
    player.playing = false;
  }
  show_clock();
  const busy = !player.message.last || player.playing || player.waiting.length;
  if (busy) requestAnimationFrame(tick);
  else player.ticking = false;
};

const show = (message) => {
  root.dataset.stage = message.stage;
  find('text').textContent = message.text;
  const done = Math.min(1, message.done_s / message.total_s) || 0;
  find('made').style.transform = `scaleX(${done})`;
  find('bar').setAttribute('aria-valuenow', Math.round(100 * done));
  // Screen readers hear each stage and each third of the way, not every update.
  const milestone = message.stage + Math.floor(done * 3) + (message.last ? 'end' : '');
  if (milestone !== player.said) {
    player.said = milestone;
    find('said').textContent = message.text;
  }
};

watch('value', () => {
  const message = props.value;
  if (!message || !message.take) return;
  if (message.take !== player.take) reset(message.take);
  player.message = message;
  show(message);
  if (message.chunks.length) {
    player.wake();
    receive(message);
  }
  if (player.context) schedule();
  if (!player.ticking) {
    player.ticking = true;
    requestAnimationFrame(tick);
  }
});

find('volume').addEventListener('input', set_volume);
find('mute').addEventListener('click', () => {
  const muted = find('mute').getAttribute('aria-pressed') !== 'true';
  find('mute').setAttribute('aria-pressed', muted);
  player.wake();
  set_volume();
});
// The click on Generate wakes the clock before the first chunk comes; playing a finished take
// ends the live one, so that two never sound at once.
document.addEventListener('click', (event) => {
  if (event.target.closest('#generate')) player.wake();
  if (event.target.closest('#take_audio, #audio_prompt')) silence();
}, true);
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
  const button = document.querySelector('#generate');
  if (!button || button.disabled || !button.offsetParent) return;
  event.preventDefault();
  event.stopPropagation();
  player.wake();
  button.click();
}, true);
