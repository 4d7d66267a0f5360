// Swagger UI over this server's description of its routes, with the key that the page at / was given.

window.ui = SwaggerUIBundle({
  url: new URL("openapi.json", document.baseURI).href,
  dom_id: "#docs",
  deepLinking: true,
  validatorUrl: null, // it would be asked for over the network
  requestInterceptor: (request) => {
    const key = sessionStorage.getItem("tpray-key");
    const given = Object.keys(request.headers).some((name) => name.toLowerCase() === "authorization");
    if (key && !given) request.headers.authorization = `Bearer ${key}`;
    return request;
  },
});
