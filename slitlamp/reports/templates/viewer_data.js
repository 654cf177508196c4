// What the page holds of an item: a compressed header and arrays, read when the item is picked.
const TYPES = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array };

// The bytes of base64 text.
function bytesOf(text) {
  return Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
}

// An item from its compressed bytes: the header's entries, and the arrays by name with their shapes.
async function unpack(text) {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  for (const one of head.arrays) {
    const size = one.shape.reduce((a, b) => a * b, 1);
    arrays[one.name] = { values: new TYPES[one.type](buffer, 4 + length + one.start, size), shape: one.shape };
  }
  return { ...head, arrays };
}

// The last axis of an array at some indices, or one number where all axes are given.
function at(array, ...index) {
  const { values, shape } = array;
  let place = 0;
  index.forEach((one, axis) => { place = place * shape[axis] + one; });
  if (index.length === shape.length) return values[place];
  const width = shape[shape.length - 1];
  return values.subarray(place * width, (place + 1) * width);
}

const named = (item, token) => item.head_tokens.indexOf(token);

// Attention of a token over the cells: weights, or null where this layer has none or the head was not kept.
function weights(item, token, layer, head) {
  const row = (item.attention_layers || []).indexOf(layer);
  if (row < 0 || !item.tokens.length) return null;
  const slot = named(item, token);
  if (head !== null && slot < 0) return null;
  const [name, ...index] = head === null ? ["mean", token, row] : ["heads", slot, row, head];
  const most = at(item.arrays[name + "_max"], ...index);
  return Float32Array.from(at(item.arrays[name], ...index), (one) => (one / 255) * most);
}

// The share of a token's attention that is on the image, 0 to 1; of the mean over heads where head is null.
function massOf(item, token, layer, head) {
  const row = (item.attention_layers || []).indexOf(layer);
  if (row < 0) return null;
  const all = Array.from(at(item.arrays.mass, token, row), (one) => (one / 255) ** 2);
  return head === null ? all.reduce((a, b) => a + b, 0) / all.length : all[head] ?? null;
}

// Per token, what it is part of: "object", "hallucinated", "correct", "wrong" or "other".
function kindsOf(item) {
  let start = 0;
  return item.tokens.map(([piece], token) => {
    const end = start + piece.length;
    const hit = (item.mentions || []).find(([from, to]) => start < to && end > from);
    start = end;
    return hit ? (hit[3] ? "object" : "hallucinated") : item.labels[token];
  });
}

function percent(share) {
  if (share === null || Number.isNaN(share)) return "not recorded";
  const value = 100 * share;
  return value >= 9.95 ? `${value.toFixed(0)} %` : value >= 0.095 ? `${value.toFixed(1)} %` : value > 0 ? "<0.1 %" : "0 %";
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e4 || size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}
