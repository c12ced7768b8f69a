// The loss curve: an SVG with a point for each step, which says its loss where the pointer is on it.

const [LEFT, RIGHT, TOP, BOTTOM] = [36, 592, 10, 128]; // of what is drawn, in a view of 600 x 150

/** Draw losses; the axis has room for `maxSteps` of them, and begins at a loss of zero. */
export function drawCurve(svg, losses, maxSteps) {
  const highest = Math.max(...losses.filter(Number.isFinite), 0.1);
  const x = (step) => LEFT + ((RIGHT - LEFT) * step) / Math.max(maxSteps - 1, 1);
  const y = (loss) => BOTTOM - ((BOTTOM - TOP) * loss) / highest;
  const all = losses.map((loss, step) => ({ loss, step, x: x(step), y: y(loss) }));
  const points = all.filter((point) => Number.isFinite(point.y));
  svg.replaceChildren(
    made("path", { d: `M${LEFT} ${TOP}V${BOTTOM}H${RIGHT}` }),
    made("text", { x: LEFT - 4, y: TOP + 8, "text-anchor": "end" }, highest.toPrecision(2)),
    made("text", { x: LEFT - 4, y: BOTTOM, "text-anchor": "end" }, "0"),
    made("text", { x: LEFT, y: BOTTOM + 16 }, "step 1"),
    made("text", { x: RIGHT, y: BOTTOM + 16, "text-anchor": "end" }, String(maxSteps)),
    made("polyline", { points: points.map((point) => `${point.x},${point.y}`).join(" ") }),
    ...points.map(({ loss, step, ...at }) => {
      const circle = made("circle", { cx: at.x, cy: at.y, r: 4 });
      circle.append(made("title", {}, `step ${step + 1}: ${loss.toFixed(5)}`));
      return circle;
    }),
  );
}

function made(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}
