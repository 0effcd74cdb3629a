"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const touch = matchMedia("(pointer: coarse)").matches;
  // plotly's own choice of buttons has one that uploads the chart, faces and all
  const buttons = (solid) => solid
    ? [["toImage"], ["zoom3d", "pan3d", "orbitRotation", "resetCameraDefault3d"]]
    : [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];
  const config = (solid) => ({
    displaylogo: false, responsive: true, plotlyServerURL: "", showTips: false, displayModeBar: touch ? false : "hover",
    modeBarButtons: buttons(solid),
  });

  // colours: "$3~0.2" is the palette's fourth at a fifth of its strength, as the theme has it now
  const paint = (value, style) => {
    if (typeof value === "string" && /^\$[a-z0-9]+(~[\d.]+)?$/.test(value)) {
      const [name, strength] = value.slice(1).split("~");
      const colour = style.getPropertyValue(/^\d/.test(name) ? `--c${name}` : `--${name}`).trim();
      if (!strength) return colour;
      const [r, g, b] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
      return `rgba(${r},${g},${b},${strength})`;
    }
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map((item) => paint(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, paint(item, style)]));
    }
    return value;
  };

  const axis = (own) => ({
    gridcolor: "$grid", linecolor: "$grey", zerolinecolor: "$grid", tickcolor: "$grey", automargin: true,
    fixedrange: touch, ...own,
    title: { standoff: 8, ...(own.title || {}) },
  });

  const layout = (own) => {
    const whole = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "$muted" },
      hoverlabel: { bgcolor: "$paper", bordercolor: "$line", font: { color: "$text" }, align: "left" },
      margin: { l: 48, r: 12, t: 10, b: 40 }, uirevision: "kept", dragmode: touch ? false : "zoom",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: "$grey", activecolor: "$text" }, ...own,
    };
    if (own.scene) return { ...whole, dragmode: "orbit" };
    return { ...whole, xaxis: axis(own.xaxis), yaxis: axis(own.yaxis) };
  };

  const draw = () => {
    const style = getComputedStyle(root);
    for (const [id, chart] of Object.entries(report.charts)) {
      const place = document.getElementById(id);
      const made = paint({ data: chart.data, layout: layout(chart.layout) }, style);
      if (root.dataset.printing) Object.assign(made.layout, { width: place.clientWidth, height: place.clientHeight });
      Plotly.react(place, made.data, made.layout, config(Boolean(chart.layout.scene)));
    }
  };

  // the picture and the name of a point
  const tip = document.getElementById("tip");
  let pointer = [0, 0];
  for (const kind of ["pointermove", "pointerdown"]) {
    addEventListener(kind, (event) => { pointer = [event.clientX, event.clientY]; }, { passive: true, capture: true });
  }
  const show = (point) => {
    const [note, picture] = point.customdata || [];
    if (note === undefined) return;
    const image = tip.querySelector("img");
    if (picture === null || picture === undefined) image.removeAttribute("src");
    else image.src = report.pictures[picture];
    const name = new DOMParser().parseFromString(point.data.name, "text/html").documentElement.textContent;
    tip.querySelector("span").textContent = `${name}\n${note}`;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(pointer[0] + 16, innerWidth - box.width - 8);
    const top = pointer[1] + 16 + box.height > innerHeight ? pointer[1] - box.height - 16 : pointer[1] + 16;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${Math.max(8, top)}px`;
  };
  const listen = () => {
    for (const id of Object.keys(report.charts)) {
      const place = document.getElementById(id);
      place.on("plotly_hover", (event) => show(event.points[0]));
      place.on("plotly_unhover", () => { tip.hidden = true; });
    }
    addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  };

  // an entry of a legend takes its lines out of every panel of its figure, and puts them in again
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      const entry = Number(button.dataset.entry);
      for (const [id, chart] of Object.entries(report.charts)) {
        if (id.replace(/-\d+$/, "") !== button.dataset.figure) continue;
        chart.data.forEach((trace, number) => { if (chart.legend[number] === entry) trace.visible = on; });
      }
      draw();
    });
  }

  // light or dark: as the system says, until one asks for the other
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  let asked = null;
  const setTheme = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(dark));
    draw();
  };
  const wanted = () => (asked === null ? system.matches : asked);
  button.hidden = false;
  button.addEventListener("click", () => { asked = root.dataset.theme !== "dark"; setTheme(asked); });
  system.addEventListener("change", () => setTheme(wanted()));
  // a chart keeps the width that it was drawn at, so it is drawn as wide as the paper first
  addEventListener("beforeprint", () => { root.dataset.printing = "true"; setTheme(false); });
  addEventListener("afterprint", () => {
    delete root.dataset.printing;
    setTheme(wanted());
    for (const id of Object.keys(report.charts)) Plotly.Plots.resize(document.getElementById(id));
  });

  // where one is, in the list of contents
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of document.querySelectorAll("section")) seen.observe(section);

  setTheme(wanted());
  listen();
  root.dataset.ready = "true";
})();
