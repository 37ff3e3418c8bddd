(() => {
  "use strict";
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Set();

  // Plotly needs colours, not CSS variables: read them from elements that the style sheet has coloured.
  const colours = () => {
    const body = getComputedStyle(document.body);
    const heading = document.querySelector("h2");
    const rule = heading ? getComputedStyle(heading).borderBottomColor : body.color;
    const raised = getComputedStyle(document.getElementById("card")).backgroundColor;
    return { ink: body.color, rule, raised };
  };
  const themed = () => {
    const { ink, rule, raised } = colours();
    return {
      "font.color": ink,
      "xaxis.gridcolor": rule, "yaxis.gridcolor": rule, "xaxis.linecolor": rule, "yaxis.linecolor": rule,
      "hoverlabel.bgcolor": raised, "hoverlabel.bordercolor": rule, "hoverlabel.font.color": ink,
      "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": rule, "modebar.activecolor": ink,
    };
  };
  const put = (layout, changes) => {
    for (const [path, value] of Object.entries(changes)) {
      const keys = path.split(".");
      const last = keys.pop();
      keys.reduce((at, key) => (at[key] ??= {}), layout)[last] = value;
    }
  };

  const showTile = (map, place, point, event) => {
    const card = document.getElementById("card");
    const tile = document.getElementById("tile");
    const columns = Number(map.dataset.columns);
    const index = point.customdata;
    const rows = Math.ceil((index + 1) / columns);
    const side = 112;
    tile.style.backgroundImage = `url("${document.getElementById(map.dataset.sprite).src}")`;
    tile.style.backgroundSize = `${columns * side}px auto`;
    tile.style.backgroundPosition = `${-(index % columns) * side}px ${-(rows - 1) * side}px`;
    document.getElementById("caption").textContent = place;
    card.hidden = false;
    card.style.left = `${Math.min(event.clientX + 14, innerWidth - 140)}px`;
    card.style.top = `${Math.max(Math.min(event.clientY + 14, innerHeight - 160), 0)}px`;
  };

  const draw = (element) => {
    const { data, layout } = JSON.parse(document.getElementById(element.dataset.figure).textContent);
    put(layout, themed());
    // On a touch screen, dragging over a figure scrolls the page.
    const coarse = matchMedia("(pointer: coarse)").matches;
    if (coarse) layout.dragmode = false;
    // On a narrow page the legend has one row per curve: make room for it.
    const rows = data.filter(({ name }) => name).length;
    if (innerWidth < 560 && rows > 3) layout.height += 20 * (rows - 3);
    const config = {
      responsive: true,
      displaylogo: false,
      displayModeBar: coarse ? false : "hover",
      showSendToCloud: false, // without these two, plotly offers to upload the figure
      plotlyServerURL: "",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    };
    Plotly.newPlot(element, data, layout, config);
    drawn.add(element);
    const map = element.closest(".map");
    if (map) {
      element.on("plotly_hover", ({ points: [point], event }) => showTile(map, point.data.name, point, event));
      element.on("plotly_unhover", () => { document.getElementById("card").hidden = true; });
    }
  };

  const recolour = () => drawn.forEach((element) => Plotly.relayout(element, themed()));
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    recolour();
  });
  dark.addEventListener("change", recolour);

  const watcher = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) { watcher.unobserve(target); draw(target); }
    }
  }, { rootMargin: "400px" });
  document.querySelectorAll(".figure").forEach((element) => watcher.observe(element));
})();
