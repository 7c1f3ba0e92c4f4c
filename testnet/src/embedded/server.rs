//! The HTTP side: token, kubeconfig, health, and everything else to the service.

use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use http::{StatusCode, header};
use krake_kube_api::serve::Certificate;
use krake_kube_api::{ApiError, Service};
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// Keeps a directory for one process, until it is dropped or the process dies.
pub(crate) fn lock(dir: &Path) -> anyhow::Result<nix::fcntl::Flock<std::fs::File>> {
    let path = dir.join("lock");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("{} cannot be written", path.display()))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).map_err(
        |(_, error)| {
            anyhow::anyhow!(
                "{} is used by another embedded cluster ({error})",
                dir.display()
            )
        },
    )
}

/// The site's name: that of the directory, or of the one above for `SITE/cluster` or `SITE/kube`.
pub(crate) fn site_of(dir: &Path) -> String {
    let name = |path: Option<&Path>| {
        path.and_then(Path::file_name)
            .map(|name| name.to_string_lossy().to_ascii_lowercase())
    };
    let own = name(Some(dir)).unwrap_or_default();
    let site = if matches!(own.as_str(), "cluster" | "kube") {
        name(dir.parent()).unwrap_or(own)
    } else {
        own
    };
    let clean: String = site
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    match clean.trim_matches('-') {
        "" => "embedded".to_owned(),
        name => name.to_owned(),
    }
}

fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    // Readers must never see half of it.
    let new = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .with_context(|| format!("{} cannot be written", new.display()))?;
    file.write_all(text.as_bytes())?;
    std::fs::rename(&new, path).with_context(|| format!("{} cannot be written", path.display()))
}

/// The token of a directory, made at the first start.
fn token(dir: &Path) -> anyhow::Result<String> {
    let path = dir.join("token");
    match std::fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => Ok(text.trim().to_owned()),
        _ => {
            let token = format!(
                "{}{}",
                uuid::Uuid::new_v4().simple(),
                uuid::Uuid::new_v4().simple()
            );
            write_secret(&path, &token)?;
            Ok(token)
        }
    }
}

fn kubeconfig(site: &str, address: SocketAddr, authority: &str, token: &str) -> String {
    let authority = base64::engine::general_purpose::STANDARD.encode(authority);
    // JSON is YAML.
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": site, "cluster": {
            "server": format!("https://{address}"), "certificate-authority-data": authority}}],
        "users": [{"name": site, "user": {"token": token}}],
        "contexts": [{"name": site, "context": {"cluster": site, "user": site}}],
        "current-context": site,
    });
    format!("{config:#}\n")
}

fn unauthorized() -> Response {
    let error = ApiError::new(
        401,
        "Unauthorized",
        "a token is needed: Authorization: Bearer TOKEN (kubectl --kubeconfig; the cluster's directory has it)",
    );
    krake_kube_api::service::respond(401, &error.to_status()).into_response()
}

async fn answer(service: Arc<Service>, token: Arc<str>, request: Request) -> Response {
    if matches!(request.uri().path(), "/livez" | "/readyz" | "/healthz") {
        return (StatusCode::OK, "ok").into_response();
    }
    let given = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "));
    // Hashes take the same time whatever was given.
    let good = given.is_some_and(|given| {
        blake3::hash(given.trim().as_bytes()) == blake3::hash(token.as_bytes())
    });
    if !good {
        return unauthorized();
    }
    let response: Response<Body> = service.handle(request).await;
    response
}

/// Writes the kubeconfig and serves until `stop`.
pub(crate) async fn serve(
    dir: &Path,
    listener: tokio::net::TcpListener,
    address: SocketAddr,
    service: Arc<Service>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let certificate = Certificate::load_or_create(dir)
        .with_context(|| format!("the certificate in {} cannot be used", dir.display()))?;
    let token: Arc<str> = token(dir)?.into();
    let site = site_of(dir);
    let config = kubeconfig(&site, address, certificate.authority(), &token);
    write_secret(&dir.join("kubeconfig"), &config)?;
    tracing::info!(%address, site, "an embedded cluster serves");
    let router = Router::new().fallback(move |request: Request| {
        answer(Arc::clone(&service), Arc::clone(&token), request)
    });
    let serving = krake_kube_api::serve::serve(listener, &certificate, router, stop.clone());
    let over = async {
        stop.cancelled().await;
        // Watches never end by themselves.
        tokio::time::sleep(super::STOP_TIME).await;
    };
    tokio::select! {
        served = serving => served.context("the cluster cannot serve"),
        () = over => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_is_named_after_its_directory() {
        for (dir, site) in [
            ("/x/dresden", "dresden"),
            ("/x/Paris/cluster", "paris"),
            ("/x/paris/kube", "paris"),
            ("/x/a_b.c", "a-b-c"),
            ("/", "embedded"),
        ] {
            assert_eq!(site_of(Path::new(dir)), site, "{dir}");
        }
    }
}
