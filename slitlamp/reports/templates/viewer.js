// The viewer: what is picked (item, token, layer, head), its controls, and what each panel shows of it.
function start(root, data) {
  const state = { item: 0, token: 0, layer: 0, head: null, side: false, opacity: 0.65, view: 0 };
  const parts = {};
  const cache = new Map();
  let shown = [...data.items.keys()];
  let item = null, picture = null, hit = null, area = null;

  const button = (text, label, onclick) => make("button", { type: "button", "aria-label": label, onclick }, text);
  const theme = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function build() {
    parts.pick = make("select", { "aria-label": "item", onchange: () => go({ item: Number(parts.pick.value), token: null }) });
    parts.search = make("input", { type: "search", placeholder: "search texts", "aria-label": "search texts", oninput: filter });
    parts.only = make("input", { type: "checkbox", onchange: filter });
    parts.live = make("p", { class: "live", "aria-live": "polite" });
    parts.ask = make("p", { class: "ask" });
    parts.words = make("div", { class: "tokens", role: "group", "aria-label": "generated tokens" });
    parts.truth = make("p", { class: "hint" });
    parts.layer = make("input", { type: "range", min: 0, step: 1, "aria-label": "layer",
      oninput: () => go({ layer: Number(parts.layer.value) }) });
    parts.layerSaid = make("output", {});
    parts.head = make("select", { "aria-label": "head",
      onchange: () => go({ head: parts.head.value === "mean" ? null : Number(parts.head.value) }) });
    parts.view = make("select", { "aria-label": "grid", onchange: () => go({ view: Number(parts.view.value) }) });
    parts.viewLabel = make("label", {}, "grid ", parts.view);
    parts.side = make("input", { type: "checkbox", onchange: () => go({ side: parts.side.checked }) });
    parts.opacity = make("input", { type: "range", min: 0, max: 1, step: 0.05, "aria-label": "opacity of the map",
      oninput: () => go({ opacity: Number(parts.opacity.value) }) });
    parts.canvas = make("canvas", { class: "picture", role: "img", onpointermove: point, onpointerleave: () => point(null) });
    parts.scale = make("div", { class: "scalebar" });
    parts.point = make("p", { class: "hint" });
    parts.mass = make("canvas", { class: "mass", role: "img", onclick: chooseMass });
    parts.lens = make("div", { class: "lens", tabindex: 0, role: "region", "aria-label": "logit lens" });
    parts.signals = make("div", { class: "signals" });
    parts.conditions = make("div", { class: "conditions" });
    parts.help = make("div", { class: "help", hidden: true });
    const panel = (name, title, hint, ...children) => {
      parts[`${name}Panel`] = make("section", { class: `panel ${name}`, "aria-label": title },
        make("h3", {}, title), make("p", { class: "hint" }, hint), ...children);
      return parts[`${name}Panel`];
    };
    parts.overlay = make("div", { class: "controls" }, make("label", { class: "grow" }, "opacity ", parts.opacity),
      make("label", { class: "check" }, parts.side, "side by side"));
    fill(parts.help, ...[
      ["← →", "token before, after"], ["↑ ↓", "layer above (later), below"], ["[ ]", "head before, after; before head 0: the mean"],
      ["n p", "next, previous item"], ["?", "show or hide this"],
    ].map(([keys, what]) => make("div", {}, ...keys.split(" ").map((one) => make("kbd", {}, one)), ` ${what}`)));
    const many = data.items.length > 1, odd = data.items.some((one) => one.wrong);
    fill(root,
      make("div", { class: "bar" },
        many ? button("‹", "previous item", () => step(-1)) : null, many ? parts.pick : null,
        many ? button("›", "next item", () => step(1)) : null, many ? parts.search : null,
        many && odd ? make("label", { class: "check" }, parts.only, data.onlyLabel) : null,
        button("?", "keyboard help", help)),
      parts.help, parts.ask, parts.words, legend(), parts.truth, parts.live,
      make("div", { class: "panels" },
        panel("attention", "Where it looks", "Attention weight on each part of the image, at the position that predicts the "
          + "picked token, in one layer and head.",
          make("div", { class: "controls" },
            make("label", { class: "grow" }, "layer ", parts.layer, parts.layerSaid), make("label", {}, "head ", parts.head), parts.viewLabel),
          parts.canvas, parts.scale,
          parts.overlay, parts.point),
        panel("massgrid", "How much it looks, by layer and head", "Per cent of the token's attention that is on the image as a whole. "
          + "Tap a cell to look through that head.", parts.mass),
        panel("lenses", "What it would say after each layer", "Logit lens: the model's own final norm and head on the residual stream "
          + "after each layer. ◆ marks the token that was generated.", parts.lens),
        panel("ledger", "Signals of this object", "The token ledger: where the named object stands in each signal among all "
          + "others, from percentile 0 (left) to 100 (right). Under a name: the direction in which hallucinated objects are expected.", parts.signals),
        panel("effects", "What the conditions change", "The text under each condition, and how much likelier or less likely it makes the "
          + "picked token of the reference's text: change of log-probability with the same words before it.", parts.conditions)));
    root.hidden = false;
    root.addEventListener("keydown", key);
    addEventListener("resize", () => item && draw());
    addEventListener("hashchange", fromHash);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => item && draw());
    filter();
  }

  function legend() {
    const kinds = data.legend;
    if (!kinds.length) return null;
    return make("p", { class: "legend" }, ...kinds.map((kind) => make("span", {}, make("span", { class: `mark ${kind}` },
      kind === "hallucinated" || kind === "wrong" ? "✕ abc" : "abc"), ` ${KINDS[kind]}`)));
  }

  const help = () => { parts.help.hidden = !parts.help.hidden; };

  function filter() {
    const wanted = parts.search.value.trim().toLowerCase();
    shown = [...data.items.keys()].filter((i) => {
      const one = data.items[i];
      return (!parts.only.checked || one.wrong) && (!wanted || `${one.item} ${one.text}`.toLowerCase().includes(wanted));
    });
    fill(parts.pick, ...shown.map((i) => make("option", { value: i }, `${data.items[i].item}: ${data.items[i].text}`)));
    if (!shown.length) fill(parts.pick, make("option", {}, "no item matches"));
    else if (item && !shown.includes(state.item)) go({ item: shown[0], token: null });
    else if (shown.length) parts.pick.value = state.item;
  }

  function step(by) {
    if (!shown.length) return;
    const place = shown.indexOf(state.item);
    go({ item: shown[(place + by + shown.length) % shown.length], token: null });
  }

  // Change what is picked, and show it. The token is chosen anew where it is null: the first that names an object.
  async function go(change) {
    Object.assign(state, change);
    const number = state.item;
    if (!item || item.number !== number) {
      if (!cache.has(number)) cache.set(number, open(number));
      const [found, image] = await cache.get(number);
      if (state.item !== number) return;
      item = found;
      picture = image;
      setItem();
    }
    if (state.token === null || state.token >= item.tokens.length) {
      const kinds = kindsOf(item);
      const order = ["hallucinated", "wrong", "object", "correct"].map((one) => kinds.indexOf(one)).filter((i) => i >= 0);
      state.token = order.length ? order[0] : 0;
    }
    draw();
  }

  async function open(number) {
    const one = data.items[number];
    const found = await unpack(one.data);
    found.number = number;
    let image = null;
    if (one.picture) {
      image = new Image();
      image.src = one.picture;
      await image.decode().catch(() => { image = null; });
    }
    return [found, image];
  }

  function setItem() {
    const heads = item.arrays.mass ? item.arrays.mass.shape[2] : 0;
    const most = item.n_layers - 1;
    parts.layer.max = most;
    state.layer = Math.min(state.layer, most);
    if (item.attention_layers?.length && !item.attention_layers.includes(state.layer)) state.layer = item.attention_layers.at(-1);
    if (state.head !== null && state.head >= heads) state.head = null;
    state.view = Math.min(state.view, Math.max(0, (item.grids || []).length - 1));
    fill(parts.head, make("option", { value: "mean" }, "mean of heads"),
      ...Array.from({ length: heads > 1 ? heads : 0 }, (_, i) => make("option", { value: i }, `head ${i}`)));
    fill(parts.view, ...(item.grids || []).map((one, i) => make("option", { value: i },
      `${one.view === 0 ? "whole image" : "tiles"} ${one.rows} × ${one.columns}`)));
    parts.viewLabel.hidden = (item.grids || []).length < 2;
    if (data.items.length > 1) parts.pick.value = state.item;
    fill(parts.ask, ...(item.prompt ? [make("strong", {}, "Prompt "), item.prompt] : []));
    const truth = [];
    if (item.asked) truth.push(`The right answer is ${item.asked.answer ?? "not known"}.`);
    if (item.truth) truth.push(item.truth.length ? `In the image: ${item.truth.join(", ")}.` : "No known object is in the image.");
    parts.truth.textContent = truth.join(" ");
    const kinds = kindsOf(item);
    fill(parts.words, ...item.tokens.map(([piece, name], i) => {
      const kind = kinds[i], bad = kind === "hallucinated" || kind === "wrong";
      return make("button", { type: "button", class: `token ${kind}${piece.trim() ? "" : " special"}`, tabindex: -1,
        "aria-label": KINDS[kind] ? `${name}, ${KINDS[kind]}` : name, onclick: () => go({ token: i }) },
        bad ? make("span", { class: "cross" }, "✕") : null, piece.trim() || name);
    }));
  }

  function draw() {
    const { token, layer } = state;
    const some = item.tokens.length > 0;
    [...parts.words.children].forEach((one, i) => {
      one.setAttribute("aria-pressed", String(i === token));
      one.tabIndex = i === token ? 0 : -1;
    });
    parts.layer.value = layer;
    parts.layerSaid.textContent = `${layer} of 0 to ${item.n_layers - 1}`;
    drawAttention(some);
    parts.lensesPanel.hidden = !some || !item.arrays.lens_id;
    if (!parts.lensesPanel.hidden) fill(parts.lens, lensTable(item, token, layer));
    drawSignals(token);
    parts.effectsPanel.hidden = !item.conditions || item.conditions.length < 2;
    if (!parts.effectsPanel.hidden) fill(parts.conditions, ...conditionRows(item, some ? token : null));
    parts.live.textContent = sentence(some);
    try {
      if (data.hash) history.replaceState(null, "", `#look=${state.item + 1},${token + 1},${layer},${state.head ?? "mean"}`);
    } catch { /* a frame without an origin has no address to write to */ }
  }

  function drawAttention(some) {
    const { token, layer } = state;
    const has = some && item.arrays.mean;
    parts.attentionPanel.hidden = !has && !picture;
    parts.massgridPanel.hidden = !has;
    const perHead = has && named(item, token) >= 0 && item.arrays.heads;
    for (const one of parts.head.options) one.disabled = one.value !== "mean" && !perHead;
    const head = perHead ? state.head : null;
    parts.head.value = head === null ? "mean" : head;
    const values = has ? weights(item, token, layer, head) : null;
    const table = data.colours;
    parts.overlay.hidden = !item.grids?.length;
    if (item.kind === "tokens") {
      if (values) drawBars(parts.canvas, picture, values, { bar: theme("--link"), line: theme("--line") });
      parts.canvas.hidden = !values;
      area = null;
    } else if (item.grids?.length) {
      area = drawPicture(parts.canvas, picture, item, values, { table, opacity: state.opacity, side: state.side, view: state.view,
        mark: theme("--mark") });
    } else if (picture) {
      area = drawPicture(parts.canvas, picture, { grids: [{ rows: 1, columns: 1 }] }, null, { table, opacity: 0, side: false, view: 0 });
    }
    const what = head === null ? "mean of heads" : `head ${head}`;
    parts.canvas.setAttribute("aria-label", values
      ? `attention of layer ${layer}, ${what}: ${percent(massOf(item, token, layer, head))} on the image` : "the image");
    scale(values);
    point(null);
    if (!has) return;
    hit = drawMass(parts.mass, item, token, { layer, head }, { table, ink: theme("--ink"), mark: theme("--mark") });
    parts.mass.setAttribute("aria-label", `weight on the image by layer and head; picked: layer ${layer}, ${what}, `
      + percent(massOf(item, token, layer, head)));
  }

  function scale(values) {
    if (!values) {
      const layers = item.attention_layers || [];
      fill(parts.scale, layers.length ? `Layer ${state.layer} does not read the image; layers that do: ${layers.join(", ")}.` : "");
      return;
    }
    if (item.kind === "tokens") {
      fill(parts.scale, `${values.length} image tokens in their order; they have no place on the image. Highest bar: ${percent(Math.max(...values))}.`);
      return;
    }
    const grid = gridCells(item, state.view);
    const own = values.subarray(grid.start, grid.start + grid.rows * grid.columns);
    const ramp = make("span", { class: "ramp" });
    ramp.style.background = `linear-gradient(to right, ${data.colours.map((one) => css(one)).join(", ")})`;
    const rest = values.length > item.grids.reduce((sum, one) => sum + one.rows * one.columns, 0) ? values.at(-1) : 0;
    fill(parts.scale, "0 ", ramp, ` ${percent(Math.max(...own))} of the token's attention (framed)`,
      make("span", { class: "hint" }, [item.pooled > 1 ? ` A cell is ${item.pooled} × ${item.pooled} patches.` : "",
        rest ? ` ${percent(rest)} more on image tokens without a place (CLS, ends of rows).` : "",
        item.cross ? " Cross-attention reads the image alone, so all of a head's weight is on it." : ""].join("")));
  }

  // What lies under the pointer.
  function point(event) {
    const plain = item.detail === "all" || !item.arrays.mean ? "" : item.detail === "mean"
      ? "To keep this page small it holds the mean over heads, not single heads."
      : "To keep this page small it holds single heads at tokens that name objects, and the mean over heads at all others.";
    parts.point.textContent = plain;
    if (!event || !area || !item.arrays.mean) return;
    const box = parts.canvas.getBoundingClientRect();
    const x = event.clientX - box.left - area.left, y = event.clientY - box.top;
    const column = Math.floor((x / area.width) * area.columns), row = Math.floor((y / area.height) * area.rows);
    if (column < 0 || row < 0 || column >= area.columns || row >= area.rows) return;
    const perHead = named(item, state.token) >= 0 && item.arrays.heads;
    const values = weights(item, state.token, state.layer, perHead ? state.head : null);
    if (values) parts.point.textContent = `row ${row}, column ${column}: ${percent(values[area.start + row * area.columns + column])}`;
  }

  function chooseMass(event) {
    const box = parts.mass.getBoundingClientRect();
    const found = hit && hit(event.clientX - box.left, event.clientY - box.top);
    if (found) go(found);
  }

  function drawSignals(token) {
    const own = item.signals;
    parts.ledgerPanel.hidden = !own;
    if (!own) return;
    if (!own.rows.length) return fill(parts.signals, make("p", {}, own.note || "no word of this text names a known object"));
    if (!own.rows.some((one) => one.token === token)) {
      return fill(parts.signals, make("p", {}, "Signals are read where an object is named. Pick one:"),
        make("div", { class: "tokens" }, ...own.rows.map((one) => make("button", { type: "button", class: `token ${one.label}`,
          onclick: () => go({ token: one.token }) }, one.label === "hallucinated" || one.label === "wrong" ? "✕ " : "", one.word.trim()))));
    }
    fill(parts.signals, ...signalRows(item, token, data.signals), make("p", { class: "hint" }, own.among));
  }

  function sentence(some) {
    if (!some) return `Item ${item.item}: no token was generated.`;
    const kind = kindsOf(item)[state.token];
    const first = `Item ${item.item}, token ${state.token + 1} of ${item.tokens.length}: “${item.tokens[state.token][1]}”`
      + (KINDS[kind] ? ` (${KINDS[kind]})` : "");
    const perHead = item.arrays.mean && named(item, state.token) >= 0 && item.arrays.heads;
    const head = perHead ? state.head : null;
    const mass = item.arrays.mean ? massOf(item, state.token, state.layer, head) : null;
    const where = `layer ${state.layer}, ${head === null ? "mean of heads" : `head ${head}`}`;
    return mass === null ? `${first}, layer ${state.layer}.` : `${first}, ${where}: ${percent(mass)} of its attention is on the image.`;
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target, tag = target.tagName;
    if (target.type === "search" || ((tag === "SELECT" || target.type === "range") && event.key.startsWith("Arrow"))) return;
    const last = item ? item.tokens.length - 1 : 0, heads = item?.arrays.mass?.shape[2] ?? 1;
    const head = state.head ?? -1;
    const moves = {
      ArrowLeft: () => go({ token: Math.max(0, state.token - 1) }),
      ArrowRight: () => go({ token: Math.min(last, state.token + 1) }),
      ArrowUp: () => go({ layer: Math.min(item.n_layers - 1, state.layer + 1) }),
      ArrowDown: () => go({ layer: Math.max(0, state.layer - 1) }),
      "[": () => go({ head: head <= 0 ? null : head - 1 }),
      "]": () => go({ head: heads > 1 ? Math.min(heads - 1, head + 1) : null }),
      n: () => step(1), p: () => step(-1), "?": help,
    };
    if (!item || !moves[event.key]) return;
    event.preventDefault();
    Promise.resolve(moves[event.key]()).then(() => {
      if (target.classList.contains("token")) parts.words.children[state.token]?.focus();
    });
  }

  // A view that somebody shared: #look=item,token,layer,head, items and tokens from 1.
  function fromHash() {
    const found = /^#look=(\d+),(\d+),(\d+),(mean|\d+)$/.exec(location.hash);
    const [wanted, token, layer] = found ? found.slice(1, 4).map(Number) : [0, 0, 0];
    if (!found || wanted < 1 || wanted > data.items.length || token < 1) return false;
    go({ item: wanted - 1, token: token - 1, layer, head: found[4] === "mean" ? null : Number(found[4]) });
    return true;
  }

  build();
  parts.opacity.value = state.opacity;
  if (fromHash()) root.scrollIntoView();
  else go({ item: 0, token: null, layer: Infinity });
}

for (const root of document.querySelectorAll(".viewer")) {
  start(root, JSON.parse(document.getElementById(root.dataset.source).textContent));
}
