// JSON whose seeds keep all their digits: they go up to 2**63 - 1, and numbers here only up to 2**53.
// In JSON text a quote inside of a string stands behind a backslash, so that these patterns meet keys alone.

/** The value of a JSON text; seeds of 16 digits and more are strings. */
export function parse(text) {
  return JSON.parse(text.replace(/([{,]\s*"(?:variation_)?seed"\s*:\s*)(\d{16,})(?=\s*[,}])/g, '$1"$2"'));
}

/** The JSON text of a value, in which seeds may be strings of digits. */
export function stringify(value) {
  return JSON.stringify(value).replace(/([{,]"(?:variation_)?seed":)"(\d+)"/g, "$1$2");
}
