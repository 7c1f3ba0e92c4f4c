//! Serving a router on one address with and without TLS.
//!
//! client-go sends credentials over TLS only (`rest.IsConfigTransportTLS`), so kubectl needs it
//! even on loopback; scripts and curl like plain HTTP there. The first byte of a connection tells
//! which one it is: a TLS record of type handshake starts with 0x16 (RFC 8446 §5.1), no HTTP
//! request does.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;

/// Connections that have not said yet what they want, at most.
const HANDSHAKES_MAX: usize = 512;
/// How long they may take.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Before another connection is taken when one could not be.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// First byte of a TLS connection.
const TLS_HANDSHAKE: u8 = 0x16;

/// A server's certificate for loopback, issued by a CA that signed nothing else.
#[derive(Clone)]
pub struct Certificate {
    acceptor: TlsAcceptor,
    authority: String,
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate").finish_non_exhaustive()
    }
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}

fn issue() -> Result<(String, String, String), rcgen::Error> {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    authority
        .distinguished_name
        .push(DnType::CommonName, "krake loopback CA");
    // Its key is forgotten at the end of this function: nobody can issue a second certificate.
    let authority_key = KeyPair::generate()?;
    let authority = authority.self_signed(&authority_key)?;
    let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let mut server = CertificateParams::new(names.to_vec())?;
    server
        .distinguished_name
        .push(DnType::CommonName, "krake loopback");
    let key = KeyPair::generate()?;
    let server = server.signed_by(&key, &authority, &authority_key)?;
    Ok((authority.pem(), server.pem(), key.serialize_pem()))
}

fn write(path: &Path, mode: u32, text: &str) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)?;
    io::Write::write_all(&mut file, text.as_bytes())?;
    file.sync_all()
}

impl Certificate {
    /// Reads `ca.crt`, `tls.crt` and `tls.key` in `directory`, or makes them there.
    ///
    /// # Errors
    /// When they cannot be read, written or used.
    pub fn load_or_create(directory: &Path) -> io::Result<Self> {
        let paths = ["ca.crt", "tls.crt", "tls.key"].map(|name| directory.join(name));
        let [authority_path, certificate_path, key_path] = &paths;
        // The key is written last: with it, all of them are there.
        if !key_path.exists() {
            let (authority, certificate, key) = issue().map_err(other)?;
            write(authority_path, 0o644, &authority)?;
            write(certificate_path, 0o644, &certificate)?;
            let unfinished = directory.join("tls.key.new");
            write(&unfinished, 0o600, &key)?;
            std::fs::rename(&unfinished, key_path)?;
        }
        let authority = std::fs::read_to_string(authority_path)?;
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(certificate_path)
            .and_then(Iterator::collect)
            .map_err(other)?;
        let key = PrivateKeyDer::from_pem_file(key_path).map_err(other)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(other)?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(other)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            authority,
        })
    }

    /// The CA's certificate in PEM, for kubeconfigs.
    pub fn authority(&self) -> &str {
        &self.authority
    }
}

type Io = Either<TcpStream, TlsStream<TcpStream>>;

/// Connections whose first bytes were seen.
struct Accepted {
    ready: mpsc::Receiver<(Io, SocketAddr)>,
    local: SocketAddr,
}

impl axum::serve::Listener for Accepted {
    type Io = Io;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(connection) => connection,
            // Only while the server stops.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }
}

async fn open(stream: TcpStream, acceptor: TlsAcceptor) -> io::Result<Io> {
    stream.set_nodelay(true)?;
    let mut first = [0];
    if stream.peek(&mut first).await? == 1 && first[0] == TLS_HANDSHAKE {
        Ok(Either::Right(acceptor.accept(stream).await?))
    } else {
        Ok(Either::Left(stream))
    }
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    ready: mpsc::Sender<(Io, SocketAddr)>,
) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let (stream, from) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors: others must end before more can come.
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            () = ready.closed() => return,
        };
        tokio::spawn(hand_on(stream, from, acceptor.clone(), ready.clone(), slot));
    }
}

async fn hand_on(
    stream: TcpStream,
    from: SocketAddr,
    acceptor: TlsAcceptor,
    ready: mpsc::Sender<(Io, SocketAddr)>,
    slot: OwnedSemaphorePermit,
) {
    match tokio::time::timeout(HANDSHAKE_TIME, open(stream, acceptor)).await {
        Ok(Ok(io)) => {
            let _ = ready.send((io, from)).await;
        }
        Ok(Err(error)) => tracing::debug!(%from, %error, "no TLS connection came about"),
        Err(_) => tracing::debug!(%from, "a connection said nothing"),
    }
    drop(slot);
}

/// Serves `router` on `listener` over TLS and plain HTTP until `stop` is cancelled.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    certificate: &Certificate,
    router: Router,
    stop: CancellationToken,
) -> io::Result<()> {
    let local = listener.local_addr()?;
    let (sender, ready) = mpsc::channel(64);
    let accepting = tokio::spawn(accept(listener, certificate.acceptor.clone(), sender));
    let served = axum::serve(Accepted { ready, local }, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await;
    accepting.abort();
    served
}
