// The page's own script: takes a picture, asks /v1, and draws where the queries looked.
window.qformers = (() => {
  const OVERLAY_PX = 256;
  const SMALL_PX = 96;
  const HITS = 6;
  let picture = null; // a data URI

  const escape = (text) =>
    String(text).replace(/[&<>"']/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[sign]);
  const find = (id) => document.getElementById(id);
  const refusal = (message) => `<p class="qf-refused" role="alert">${escape(message)}</p>`;

  function show(source) {
    picture = source;
    const preview = find("qf-preview");
    preview.onerror = () => {
      preview.hidden = true; // TIFF: the service reads it, the browser does not
      find("qf-hint").hidden = false;
      find("qf-hint").textContent = "Your browser cannot show this picture; it can be sent all the same";
    };
    preview.onload = () => {
      preview.hidden = false;
      find("qf-hint").hidden = true;
    };
    preview.alt = "Chosen picture";
    preview.src = source;
    find("qf-error").textContent = "";
  }

  function take(file) {
    if (!file) return;
    const reader = new FileReader();
    reader.onload = () => show(reader.result);
    reader.onerror = () => (find("qf-error").textContent = `${file.name} cannot be read`);
    reader.readAsDataURL(file);
  }

  document.addEventListener("change", (event) => {
    if (event.target.id === "qf-file") take(event.target.files[0]);
  });
  document.addEventListener("click", (event) => {
    const example = event.target.closest?.("[data-example]");
    if (example) show(example.dataset.example);
  });
  const overDrop = (event) => event.target.closest?.(".qf-drop");
  document.addEventListener("dragover", (event) => overDrop(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!overDrop(event)) return;
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });

  const sent = (source) => source.slice(source.indexOf(",") + 1); // the base64 after a data URI's head

  async function call(path, body) {
    let answer;
    try {
      answer = await fetch(path, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
      });
    } catch {
      throw new Error("The service does not answer: is it still running?");
    }
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error.message);
    return content;
  }

  const load = (source) =>
    new Promise((resolve) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => resolve(null);
      image.src = source;
    });

  // The centre square in grey, and red where a query looked: the strongest patch is fully red.
  function overlay(image, map, side) {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side;
    const brush = canvas.getContext("2d");
    brush.fillStyle = "white";
    brush.fillRect(0, 0, side, side);
    if (image) {
      const square = Math.min(image.naturalWidth, image.naturalHeight);
      brush.filter = "grayscale(1) opacity(.75)";
      brush.drawImage(image, (image.naturalWidth - square) / 2, (image.naturalHeight - square) / 2, square, square, 0, 0, side, side);
      brush.filter = "none";
    }
    const strongest = Math.max(...map.flat(), 1e-12);
    map.forEach((row, y) =>
      row.forEach((weight, x) => {
        const [left, top] = [Math.round((x * side) / row.length), Math.round((y * side) / map.length)];
        const [right, bottom] = [Math.round(((x + 1) * side) / row.length), Math.round(((y + 1) * side) / map.length)];
        brush.fillStyle = `rgba(224, 49, 49, ${(0.85 * weight) / strongest})`;
        brush.fillRect(left, top, right - left, bottom - top);
      }),
    );
    return canvas.toDataURL("image/jpeg", 0.85);
  }

  const mean = (maps) => maps[0].map((row, y) => row.map((_, x) => maps.reduce((sum, map) => sum + map[y][x], 0) / maps.length));

  async function looked(source, request) {
    const [image, { maps }] = await Promise.all([load(source), call("/v1/attention", { images: [sent(source)], ...request })]);
    return { image, maps };
  }

  const drawn = (source, what, side) =>
    `<img class="qf-overlay" src="${source}" width="${side}" height="${side}" alt="${escape(what)}">`;

  function everyQuery({ image, maps }) {
    const each = maps.map((map, number) => drawn(overlay(image, map, SMALL_PX), `Where query ${number + 1} looked`, SMALL_PX));
    return (
      `<figure class="qf-looked">${drawn(overlay(image, mean(maps), OVERLAY_PX), "Where the queries looked, all together", OVERLAY_PX)}` +
      `<figcaption>Where the queries looked: all together, and each of the ${maps.length}</figcaption></figure>` +
      `<div class="qf-queries">${each.join("")}</div>`
    );
  }

  // Runs one question; whatever goes wrong is said in the place of the answer.
  const answering = (work) => async (...given) => {
    try {
      return await work(...given);
    } catch (error) {
      return refusal(error.message);
    }
  };

  function needed() {
    if (!picture) throw new Error("Choose a picture first.");
    return picture;
  }

  function said(text) {
    if (!text?.trim()) throw new Error("Type something first.");
    return text.trim();
  }

  const caption = answering(async () => {
    const source = needed();
    const [{ captions }, seen] = await Promise.all([
      call("/v1/caption", { images: [sent(source)] }),
      looked(source, { speaker: true }),
    ]);
    return `<p class="qf-said" role="status">${escape(captions[0][0]) || "(nothing)"}</p>${everyQuery(seen)}`;
  });

  const ask = answering(async (question) => {
    const [source, words] = [needed(), said(question)];
    const [{ answers }, seen] = await Promise.all([
      call("/v1/ask", { images: [sent(source)], questions: [words] }),
      looked(source, { speaker: true }),
    ]);
    return `<p class="qf-said" role="status">${escape(answers[0]) || "(nothing)"}</p>${everyQuery(seen)}`;
  });

  const match = answering(async (lines) => {
    const source = needed();
    const texts = said(lines).split("\n").map((line) => line.trim()).filter(Boolean);
    const { matches } = await call("/v1/match", { images: [sent(source)], texts });
    const rows = await Promise.all(
      texts.map(async (text, number) => {
        const seen = await looked(source, { text });
        const percent = (100 * matches[0][number]).toFixed(1);
        return { match: matches[0][number], html:
          `<li class="qf-match">${drawn(overlay(seen.image, mean(seen.maps), SMALL_PX), `Where the queries looked for: ${text}`, SMALL_PX)}` +
          `<div><span>${escape(text)}</span><meter min="0" max="100" value="${percent}" aria-label="${escape(text)}">${percent} %</meter>` +
          `<b>${percent} %</b></div></li>` };
      }),
    );
    rows.sort((one, other) => other.match - one.match);
    return `<ol class="qf-matches" role="status">${rows.map((row) => row.html).join("")}</ol>`;
  });

  const search = answering(async (text, withPicture) => {
    const request = { k: HITS, thumbnails: true };
    if (text?.trim()) request.text = text.trim();
    if (withPicture) request.images = [sent(needed())];
    if (!request.text && !request.images) throw new Error("Type something first, or tick the picture.");
    const { hits } = await call("/v1/search", request);
    const cards = await Promise.all(
      hits.map(async (hit) => {
        let shown = "<p>The file is gone.</p>";
        if (hit.thumbnail) {
          const source = `data:image/jpeg;base64,${hit.thumbnail}`;
          const seen = await looked(source, request.text ? { text: request.text } : {});
          shown =
            `<img class="qf-thumbnail" src="${source}" alt="${escape(hit.columns.caption || hit.path)}">` +
            drawn(overlay(seen.image, mean(seen.maps), OVERLAY_PX), "Where the queries looked", OVERLAY_PX);
        }
        return `<li>${shown}<p>${escape(hit.columns.caption || "")}<small>${escape(hit.path)} · ${hit.score.toFixed(3)}</small></p></li>`;
      }),
    );
    return `<ol class="qf-hits" role="status">${cards.join("")}</ol>`;
  });

  return { caption, ask, match, search };
})();
