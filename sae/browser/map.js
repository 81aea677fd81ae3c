// The map of a dictionary's latents on a canvas: hover names a latent, a click opens it.
"use strict";

const N_COLOURED = 8; // clusters that get a colour of their own; the others are told by hovering
const NEAR = 14; // pixels

function disc(paint, x, y, radius) {
  paint.beginPath();
  paint.arc(x, y, radius, 0, 7);
  paint.fill();
}

class LatentMap {
  constructor({ dictionary, planes, cluster }) {
    Object.assign(this, { dictionary, planes, cluster, plane: planes[0], at: -1, only: null });
    this.colour = cluster
      ? "cluster"
      : (dictionary.columns.find((one) => one.kind === "score")?.id ?? "density");
    this.zoom = { scale: 1, x: 0.5, y: 0.5 };
    this.canvas = el("canvas", {
      class: "map",
      tabindex: "0",
      role: "application",
      "aria-label": `Map of the latents of ${dictionary.name}: arrow keys go to the next point, Enter opens it`,
      onpointermove: (event) => this.onMove(event),
      onpointerdown: (event) => this.onDown(event),
      onpointerup: (event) => this.onUp(event),
      onpointerleave: () => this.leave(),
      onkeydown: (event) => this.onKey(event),
      onwheel: (event) => this.onWheel(event),
      onblur: () => this.leave(),
    });
    this.legend = el("div", { class: "map-legend" });
    this.note = el("p", { class: "note" });
    this.top = el("canvas", { class: "map-top", "aria-hidden": "true" }); // the ring, apart from the many points
    const layers = el("div", { class: "map-layers" }, this.canvas, this.top);
    const body = el("div", { class: "map-body" }, layers, this.legend);
    this.node = el("div", { class: "map-card" }, this.tools(), body, this.note);
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.canvas);
    addEventListener("themechange", () => this.canvas.isConnected && this.draw());
    this.usePlane(0);
  }

  tools() {
    const columns = this.dictionary.columns.map(({ id, name }) => [id, visible(name)]);
    const colours = this.cluster ? [["cluster", "cluster"], ...columns] : columns;
    const planes = this.planes.map((plane, i) => [String(i), visible(plane.name)]);
    const zoom = (text, label, factor) =>
      button(text, { class: "quiet", "aria-label": label, title: label }, () =>
        this.magnify(factor),
      );
    return el(
      "div",
      { class: "map-tools" },
      choice("Layout", planes, "0", (i) => this.usePlane(Number(i))),
      choice("Colour", colours, this.colour, (id) => {
        this.colour = id;
        this.draw();
      }),
      el(
        "div",
        { class: "zoom", role: "group", "aria-label": "Zoom" },
        zoom("+", "Zoom in", 1.6),
        zoom("−", "Zoom out", 1 / 1.6),
        zoom("⤢", "Whole map", 0),
      ),
    );
  }

  usePlane(i) {
    this.plane = this.planes[i];
    const finite = (values) => values.filter(Number.isFinite);
    const extent = (values) =>
      finite(values).reduce(
        ([low, high], value) => [Math.min(low, value), Math.max(high, value)],
        [Infinity, -Infinity],
      );
    const { x, y } = this.plane;
    this.extent = [extent(x), extent(y)];
    this.drawn = this.dictionary
      .order("latent", 1)
      .filter((row) => Number.isFinite(x[row]) && Number.isFinite(y[row]));
    this.note.replaceChildren(
      `${whole.format(this.drawn.length)} latents · `,
      said(this.plane.note),
    );
    this.magnify(0);
  }

  /** Pixels of the whole layout at the present zoom: one scale for both axes where they are alike. */
  span() {
    const [width, height] = [this.size.width - 24, this.size.height - 24];
    const [[left, right], [low, high]] = this.extent;
    const { scale } = this.zoom;
    if (!this.plane.alike || !(right > left && high > low)) return [width * scale, height * scale];
    const unit = scale * Math.min(width / (right - left), height / (high - low));
    return [unit * (right - left), unit * (high - low)];
  }

  /** Pixels of a latent. */
  place(row, [across, down] = this.span()) {
    const [[left, right], [low, high]] = this.extent;
    const { width, height } = this.size;
    const u = (this.plane.x[row] - left) / (right - left || 1);
    const v = 1 - (this.plane.y[row] - low) / (high - low || 1);
    return [width / 2 + (u - this.zoom.x) * across, height / 2 + (v - this.zoom.y) * down];
  }

  draw() {
    const width = this.canvas.clientWidth;
    const height = this.canvas.clientHeight;
    if (!width || !height) return;
    this.size = { width, height };
    const paint = this.blank(this.canvas);
    const colour = pointColours(this);
    this.legend.replaceChildren(...colour.legend);
    const size = Math.min(
      9,
      Math.max(2.4, Math.sqrt((width * height) / this.drawn.length / 8)) *
        Math.sqrt(this.zoom.scale),
    );
    const [span, inView] = [this.span(), []];
    for (const row of this.drawn) {
      const [x, y] = this.place(row, span);
      if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
      inView.push([row, x, y]);
      paint.fillStyle = colour.of(row);
      paint.globalAlpha = colour.dim(row) ? 0.12 : 0.85;
      if (size < 3) paint.fillRect(x - size / 2, y - size / 2, size, size);
      else disc(paint, x, y, size / 2);
    }
    writeLabels(paint, this, inView, size / 2 + 4);
    this.ring();
  }

  /** An empty canvas of the size of the map, in the pixels of the screen. */
  blank(canvas) {
    const ratio = devicePixelRatio || 1;
    canvas.width = this.size.width * ratio;
    canvas.height = this.size.height * ratio;
    const paint = canvas.getContext("2d");
    paint.scale(ratio, ratio);
    return paint;
  }

  /** Marks the latent that is pointed at. */
  ring() {
    if (!this.size) return;
    const paint = this.blank(this.top);
    if (this.at < 0) return;
    const [x, y] = this.place(this.at);
    paint.strokeStyle = colourOf("--ink");
    paint.lineWidth = 2;
    paint.beginPath();
    paint.arc(x, y, 7, 0, 7);
    paint.stroke();
  }

  nearest(x, y, accepts = () => true) {
    let [best, least] = [-1, Infinity];
    const span = this.span();
    for (const row of this.drawn) {
      const [u, v] = this.place(row, span);
      const far = (u - x) ** 2 + (v - y) ** 2;
      if (far < least && accepts(u - x, v - y, row)) [best, least] = [row, far];
    }
    return { row: best, far: Math.sqrt(least) };
  }

  onMove(event) {
    this.byKey = false;
    if (this.drag) return this.pan(event);
    const { row, far } = this.nearest(event.offsetX, event.offsetY);
    return this.point(far <= NEAR ? row : -1);
  }

  /** Marks a latent and says what it is. */
  point(row) {
    if (row === this.at) return;
    this.at = row;
    this.canvas.classList.toggle("on", row >= 0);
    this.ring();
    if (row < 0) return hideTip();
    const { left, top } = this.pointRect(row);
    const { dictionary, cluster } = this;
    const figures = dictionary.columns.map((column) => [
      said(column.name),
      ` ${shown(column.kind, dictionary.value(column.id, row))}`,
    ]);
    const group =
      cluster && cluster[row] >= 0
        ? [["cluster ", said(visible(dictionary.map.clusters[cluster[row]] ?? ""))]]
        : [];
    const head = [el("b", {}, said(visible(dictionary.label(row) || "(no label)"))), ` #${row}`];
    showTip(left, top, head, ...figures, ...group);
    if (this.byKey) tipAnchor = { getBoundingClientRect: () => this.pointRect(row) };
    announce(`${dictionary.label(row) || "no label"}, latent ${row}`);
  }

  /** Where a latent is in the window. */
  pointRect(row) {
    const [x, y] = this.place(row);
    const { left, top } = this.canvas.getBoundingClientRect();
    return { left: left + x, top: top + y };
  }

  leave() {
    this.drag = null;
    this.point(-1);
  }

  onDown(event) {
    this.drag = { x: event.offsetX, y: event.offsetY, moved: false };
    if (event.pointerType === "touch") this.onTouch(event);
  }

  onTouch(event) {
    this.drag = null;
    const { row, far } = this.nearest(event.offsetX, event.offsetY);
    this.tapped = far <= NEAR * 1.5 && row === this.at; // the first tap names, the second opens
    this.point(far <= NEAR * 1.5 ? row : -1);
  }

  onUp(event) {
    const moved = this.drag?.moved;
    this.drag = null;
    const open = event.pointerType === "touch" ? this.tapped : !moved;
    if (open && this.at >= 0) goTo(latentHash(this.dictionary, this.at));
  }

  pan(event) {
    const [x, y] = [event.offsetX - this.drag.x, event.offsetY - this.drag.y];
    if (!this.drag.moved && Math.hypot(x, y) < 4) return;
    const [across, down] = this.span();
    this.zoom.x -= x / across;
    this.zoom.y -= y / down;
    this.drag = { x: event.offsetX, y: event.offsetY, moved: true };
    this.draw();
  }

  /** Zooms by a factor about the middle or about pixels that stay in place, or shows all for 0. */
  magnify(factor, about = null) {
    const scale = Math.min(64, Math.max(1, this.zoom.scale * factor));
    if (about) {
      const [across, down] = this.span();
      const change = 1 - this.zoom.scale / scale;
      this.zoom.x += ((about[0] - this.size.width / 2) / across) * change;
      this.zoom.y += ((about[1] - this.size.height / 2) / down) * change;
    }
    this.zoom = scale === 1 ? { scale: 1, x: 0.5, y: 0.5 } : { ...this.zoom, scale };
    this.draw();
  }

  onWheel(event) {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    this.magnify(event.deltaY < 0 ? 1.25 : 0.8, [event.offsetX, event.offsetY]);
  }

  onKey(event) {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Enter" && this.at >= 0) goTo(latentHash(this.dictionary, this.at));
    if (!Object.hasOwn(ways, event.key)) return;
    event.preventDefault();
    const [a, b] = ways[event.key];
    const ahead = (x, y, row) => row !== this.at && a * x + b * y > Math.abs(b * x - a * y);
    const from = this.at >= 0 ? this.place(this.at) : [this.size.width / 2, this.size.height / 2];
    const { row } = this.nearest(...from, ahead);
    this.byKey = true;
    if (row >= 0) this.point(row);
  }
}
