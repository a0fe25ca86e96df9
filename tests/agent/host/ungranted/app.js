// Uses what nobody has granted: each path says in its answer what came of it.
addEventListener("fetch", (event) => event.respondWith(serve(event.request)));

async function serve(request) {
  switch (new URL(request.url).pathname) {
    case "/":
      return new Response("here\n");
    case "/requests":
      return fetch("http://example.test/").then(
        () => new Response("sent\n"),
        (error) => new Response(`denied: ${error}\n`),
      );
    case "/throws":
      throw new Error("thrown before the answer");
    default:
      return new Response("nothing here\n", { status: 404 });
  }
}
