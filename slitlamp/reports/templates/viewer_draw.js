// Drawing: the picture with attention over it, bars where tokens have no place, and the grid of layers and heads.

// A colour of the map: [red, green, blue] at 0..1, between the colours of the table.
function colour(table, share) {
  const place = Math.min(1, Math.max(0, share)) * (table.length - 1);
  const low = Math.floor(place), high = Math.min(low + 1, table.length - 1);
  return table[low].map((one, i) => Math.round(one + (table[high][i] - one) * (place - low)));
}

const css = (rgb, alpha = 1) => `rgba(${rgb.join(",")},${alpha})`;
const ink = (rgb) => (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140 ? "#000" : "#fff");

// A canvas made as large as it is shown, and its context in units of CSS pixels.
function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

// The cells of one grid among all cells.
function gridCells(item, number) {
  let start = 0;
  for (let i = 0; i < number; i += 1) start += item.grids[i].rows * item.grids[i].columns;
  return { start, ...item.grids[number] };
}

// The picture, with the map over it or beside it; returns the areas of the map on the canvas.
function drawPicture(canvas, picture, item, values, options) {
  const { table, opacity, side, view, mark } = options;
  const grid = gridCells(item, view);
  const ratio = picture ? picture.naturalHeight / picture.naturalWidth : grid.rows / grid.columns;
  const full = canvas.clientWidth, gap = side ? 8 : 0;
  let width = side ? (full - gap) / 2 : full;
  let height = width * ratio;
  if (height > 560) { width *= 560 / height; height = 560; }
  const context = sized(canvas, full, height);
  context.clearRect(0, 0, full, height);
  context.imageSmoothingEnabled = picture ? picture.naturalWidth > width : false;
  if (picture) context.drawImage(picture, 0, 0, width, height);
  const left = side ? width + gap : 0;
  if (values) {
    const own = values.subarray(grid.start, grid.start + grid.rows * grid.columns);
    const most = Math.max(...own) || 1;
    const [w, h] = [width / grid.columns, height / grid.rows];
    for (let i = 0; i < own.length; i += 1) {
      const column = i % grid.columns, row = Math.floor(i / grid.columns), share = own[i] / most;
      const [x, y] = [Math.round(left + column * w), Math.round(row * h)];
      // over the picture, little weight is let through, so that what is there can be seen
      context.fillStyle = css(colour(table, share), side ? 1 : opacity * (0.2 + 0.8 * share));
      context.fillRect(x, y, Math.round(left + (column + 1) * w) - x, Math.round((row + 1) * h) - y);
    }
    const top = own.indexOf(Math.max(...own));
    if (own[top] > 0) {
      context.strokeStyle = mark;
      context.lineWidth = 2;
      context.strokeRect(left + (top % grid.columns) * w + 1, Math.floor(top / grid.columns) * h + 1, w - 2, h - 2);
    }
  }
  return { left, width, height, ...grid };
}

// Attention over image tokens that have no place: a bar for each, in their order.
function drawBars(canvas, picture, values, options) {
  const full = canvas.clientWidth, high = 180;
  const shown = picture ? Math.min(full, (240 * picture.naturalWidth) / picture.naturalHeight) : 0;
  const top = picture ? (shown * picture.naturalHeight) / picture.naturalWidth + 10 : 0;
  const height = top + high;
  const context = sized(canvas, full, height);
  context.clearRect(0, 0, full, height);
  if (picture) context.drawImage(picture, 0, 0, shown, top - 10);
  const most = Math.max(...values) || 1, step = full / values.length;
  values.forEach((one, i) => {
    const h = (one / most) * (high - 4);
    context.fillStyle = options.bar;
    context.fillRect(i * step, height - h, Math.max(1, step - 1), h);
  });
  context.fillStyle = options.line;
  context.fillRect(0, height - 1, full, 1);
}

// Weight on the image by layer (rows) and head (columns, the mean first); returns where a click falls.
function drawMass(canvas, item, token, state, options) {
  const layers = item.attention_layers, heads = item.arrays.mass.shape[2];
  const width = canvas.clientWidth, left = 44, top = 34;
  const columns = heads > 1 ? heads + 1 : 1;
  const w = (width - left) / columns;
  const h = Math.max(layers.length > 24 ? 13 : 20, Math.min(40, w, 420 / layers.length));
  const context = sized(canvas, width, top + layers.length * h + 2);
  context.clearRect(0, 0, width, top + layers.length * h + 2);
  context.font = "12px system-ui, sans-serif";
  context.textBaseline = "middle";
  const skip = Math.ceil(26 / w);
  for (let column = 0; column < columns; column += 1) {
    context.fillStyle = options.ink;
    context.textAlign = "center";
    const label = column === 0 ? "mean" : String(column - 1);
    if (column === 0 || (column - 1) % skip === 0) context.fillText(label, left + (column + 0.5) * w, 22, w * skip);
    layers.forEach((layer, row) => {
      const value = massOf(item, token, layer, column === 0 ? null : column - 1);
      const rgb = colour(options.table, Math.min(1, value));
      const x = left + column * w, y = top + row * h;
      context.fillStyle = css(rgb);
      context.fillRect(x, y, w - 1, h - 1);
      if (w >= 30 && h >= 16) {
        context.fillStyle = ink(rgb);
        context.fillText((100 * value).toFixed(0), x + w / 2, y + h / 2);
      }
      if (layer === state.layer && column === (state.head === null ? 0 : state.head + 1)) {
        context.strokeStyle = options.mark;
        context.lineWidth = 3;
        context.strokeRect(x + 0.5, y + 0.5, w - 2, h - 2);
      }
    });
  }
  context.fillStyle = options.ink;
  context.textAlign = "left";
  if (columns > 1) context.fillText("head", left + w + 4, 7);
  context.fillText("layer", 0, 22);
  context.textAlign = "right";
  const every = Math.ceil(14 / h);
  layers.forEach((layer, row) => {
    if (row % every === 0) context.fillText(String(layer), left - 8, top + (row + 0.5) * h);
  });
  return (x, y) => {
    const column = Math.floor((x - left) / w), row = Math.floor((y - top) / h);
    if (column < 0 || column >= columns || row < 0 || row >= layers.length) return null;
    return { layer: layers[row], head: column === 0 ? null : column - 1 };
  };
}
