// @ts-check
// A time as musicians write it: seconds, or minutes and seconds.

/**
 * Seconds of "90", "1:30" or "1:30.5"; NaN for anything else.
 * @param {string} text
 */
export function seconds_of(text) {
  const found = /^\s*(?:(\d+):(?=[0-5]?\d(?:\.|\s*$)))?(\d+(?:\.\d*)?|\.\d+)\s*$/.exec(text);
  return found ? 60 * Number(found[1] ?? 0) + Number(found[2]) : NaN;
}

/**
 * "1:30", or "1:30.5" where it is no whole second; to a thousandth.
 * @param {number} seconds
 */
export function time_of(seconds) {
  const thousandths = Math.round(1000 * seconds);
  const minutes = Math.floor(thousandths / 60_000), rest = (thousandths % 60_000) / 1000;
  return `${minutes}:${rest < 10 ? '0' : ''}${rest}`;
}
