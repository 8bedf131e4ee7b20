/* The book's figures with sliders. Each is complete in the page, drawn at its first position by
   book/_ext/companion_sliders.py; here the same formulas move it. Nothing is loaded. */
(function () {
  "use strict";

  const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;

  /* The formulas of companion.losses. */
  const formulas = {
    /* log(1 + exp(x)) without overflow */
    softplus: (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))),
    probability: (margin) => Math.exp(-formulas.softplus(-margin)),
    loss: (margin) => formulas.softplus(-margin),
    /* d loss / d margin */
    gradient: (margin) => -formulas.probability(-margin),
    meanLoss: (chosen, rejected) => mean(chosen.map((c, i) => formulas.loss(c - rejected[i]))),
    meanPenalty: (chosen, rejected) => mean(chosen.map((c, i) => (c + rejected[i]) ** 2)),
    bestShift: (chosen, rejected) => -mean(chosen.map((c, i) => c + rejected[i])) / 2,
  };

  /* As the page writes numbers: a real minus sign, and no minus before zero. */
  function format(value, digits) {
    let text = value.toFixed(digits);
    if (Number(text) === 0) text = text.replace("-", "");
    return text.replace("-", "−");
  }

  function place([low, high, from, to], value) {
    return from + ((value - low) / (high - low)) * (to - from);
  }

  class Figure {
    constructor(box) {
      this.box = box;
      this.settings = JSON.parse(box.dataset.settings);
      this.inputs = [...box.querySelectorAll("input[data-slider]")];
      this.draw = drawers[box.dataset.sliderFigure];
      this.inputs.forEach((input) => input.addEventListener("input", () => this.update()));
      box.querySelector(".slider-controls").hidden = false;
      this.update();
    }

    update() {
      const state = {};
      this.inputs.forEach((input) => {
        state[input.dataset.slider] = Number(input.value);
        const shown = this.box.querySelector(`[data-shows="${input.dataset.slider}"]`);
        shown.textContent = format(Number(input.value), Number(input.dataset.digits));
      });
      const spoken = this.draw(state);
      this.inputs.forEach((input) => {
        const name = this.box.querySelector(`[data-shows="${input.dataset.slider}"]`).textContent;
        input.setAttribute("aria-valuetext", `${name}: ${spoken}`);
      });
    }

    x(panel, value) {
      return place(this.settings.panels[panel].x, value);
    }

    y(panel, value) {
      return place(this.settings.panels[panel].y, value);
    }

    /* Move a part: its attributes, numbers as the page has them. */
    move(name, attributes) {
      const part = this.box.querySelector(`[data-part="${name}"]`);
      for (const [key, value] of Object.entries(attributes)) {
        part.setAttribute(key, typeof value === "number" ? value.toFixed(2) : value);
      }
    }

    show(name, text) {
      this.box.querySelector(`[data-output="${name}"]`).textContent = text;
    }

    /* A curve over the panel's whole width. */
    path(panel, formula) {
      const [low, high] = this.settings.panels[panel].x;
      const last = this.settings.points - 1;
      const points = Array.from({ length: last + 1 }, (_, i) => {
        const value = low + ((high - low) * i) / last;
        return `${this.x(panel, value).toFixed(2)} ${this.y(panel, formula(value)).toFixed(2)}`;
      });
      return "M" + points.join(" L");
    }
  }

  const drawers = {
    loss({ margin }) {
      const loss = formulas.loss(margin);
      const slope = formulas.gradient(margin);
      const x = this.x("loss", margin);
      const [low, high] = this.settings.panels.loss.x;
      this.move("guide", { x1: x, x2: x });
      this.move("tangent", {
        y1: this.y("loss", loss + slope * (low - margin)),
        y2: this.y("loss", loss + slope * (high - margin)),
      });
      this.move("point-loss", { cx: x, cy: this.y("loss", loss) });
      this.move("point-gradient", { cx: x, cy: this.y("gradient", slope) });
      for (const [name, side] of [["chosen", 1], ["rejected", -1]]) {
        const at = this.x("scores", (side * margin) / 2);
        const tip = at - side * slope * 40;
        const row = Number(this.box.querySelector(`[data-part="force-${name}"]`).getAttribute("y1"));
        this.move(`force-${name}`, { x1: at, x2: tip });
        const [top, end, bottom] = [row - 4.5, tip + side * 7, row + 4.5].map((v) => v.toFixed(2));
        const start = tip.toFixed(2);
        this.move(`head-${name}`, {
          d: `M${start} ${top} L${end} ${row.toFixed(2)} L${start} ${bottom} Z`,
        });
        this.move(name, side > 0 ? { cx: at } : { x: at - 6 });
      }
      this.show("probability", format(formulas.probability(margin), 3));
      this.show("loss", format(loss, 3));
      this.show("gradient", format(slope, 3));
      return `loss ${format(loss, 2)}, gradient ${format(slope, 2)}`;
    },

    centering({ shift, coefficient }) {
      const { chosen, rejected } = this.settings;
      const by = (s) => (values) => values.map((value) => value + s);
      const parts = (s) => {
        const [c, r] = [chosen, rejected].map(by(s));
        return [formulas.meanLoss(c, r), coefficient * formulas.meanPenalty(c, r)];
      };
      const total = (s) => parts(s).reduce((a, b) => a + b);
      const [loss, penalty] = parts(shift);
      const ceiling = this.settings.panels.total.y[1];
      this.move("curve", { d: this.path("total", total) });
      this.move("point", {
        cx: this.x("total", shift),
        cy: this.y("total", Math.min(loss + penalty, ceiling)),
      });
      const average = mean([...chosen, ...rejected]) + shift;
      const line = this.x("pairs", average);
      this.move("mean", { x1: line, x2: line });
      chosen.forEach((_, i) => {
        this.move(`chosen-${i}`, { cx: this.x("pairs", chosen[i] + shift) });
        this.move(`rejected-${i}`, { x: this.x("pairs", rejected[i] + shift) - 5.5 });
      });
      /* without the penalty every shift is as good as any other */
      const best = formulas.bestShift(chosen, rejected);
      const at = this.x("total", best);
      this.move("best", { x1: at, x2: at, visibility: coefficient > 0 ? "visible" : "hidden" });
      this.show("best", coefficient > 0 ? format(best, 2) : "any");
      this.show("loss", format(loss, 4));
      this.show("penalty", format(penalty, 4));
      this.show("total", format(loss + penalty, 4));
      this.show("mean", format(average, 2));
      return `total ${format(loss + penalty, 3)}`;
    },
  };

  window.companionSliders = { formulas, format };
  document.querySelectorAll("[data-slider-figure]").forEach((box) => new Figure(box));
})();
