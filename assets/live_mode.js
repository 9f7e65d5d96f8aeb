// Tells the server how much of a live piece was heard: it makes little more than that.

const PERIOD_MS = 200;
let timer = 0;

function report() {
  const { job, session } = props.value ?? {};
  const view = window.musicgenPlayer;
  const track = view?.sound.track;
  if (!job || view.streaming !== job || !track?.rate) return;
  const samples = Math.round(view.sound.position_s * track.rate);
  const body = JSON.stringify({ samples, underruns: view.sound.report.underruns });
  const headers = { 'content-type': 'application/json', 'x-session': session };
  fetch(`jobs/${job}/played`, { method: 'POST', headers, body }).catch(() => {});
}

watch('value', () => {
  clearInterval(timer);
  if (props.value?.job) timer = setInterval(report, PERIOD_MS);
});

document.addEventListener('click', ({ target }) => {
  const view = window.musicgenPlayer;
  if (target.closest('#live_start')) view?.sound.wake(); // a browser wants a gesture for sound
  if (target.closest('#live_stop')) view?.sound.stop();
  const stop = document.querySelector('#live_stop');
  if (target.closest('.player-stop') && stop?.offsetParent) stop.click();
}, true);
