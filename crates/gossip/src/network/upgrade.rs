//! What becomes of a TCP connection: one of the swarm, over Noise and yamux, or one that carries
//! frames and nothing else, over TLS. Whoever dials wants the one or the other and says so first
//! (multistream-select); who is at the other end is shown by the same key in both.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

use futures::io::BufReader;
use futures::{AsyncRead, AsyncWrite};
use futures_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use futures_rustls::rustls::crypto::{CryptoProvider, aws_lc_rs};
use futures_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use futures_rustls::rustls::{
    self, CertificateError, ClientConfig, CommonState, DigitallySignedStruct, NoKeyLog,
    SignatureScheme, version,
};
use futures_rustls::{TlsAcceptor, TlsConnector};
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo};
use libp2p::tcp::tokio::TcpStream;
use libp2p::tls::certificate;
use libp2p::{PeerId, identity, noise, tls, yamux};
use multistream_select::{Negotiated, Version, dialer_select_proto, listener_select_proto};
use tokio::sync::mpsc;
use tracing::debug;

/// What is agreed on for frames: TLS 1.3 with the certificates of libp2p.
const DIRECT: &str = "/krake/frames-direct/1";
/// What is agreed on for a connection of the swarm.
const NOISE: &str = "/noise";
/// Connections that were accepted and wait for their reader.
const ACCEPTED_MAX: usize = 64;
/// Read from the system at once, at most; the library asks for 4 KiB.
const READ_BYTES: usize = 64 * 1024;

/// The dialler's end of a connection for frames; nothing is ever sent back over it but its end.
pub(super) type Outgoing = Box<dyn Duplex>;
/// The other end.
pub(super) type Incoming = Box<dyn AsyncRead + Send + Unpin>;
/// Connections for frames that others have made, with who they are, members or not.
pub(super) type Accepted = mpsc::Receiver<(PeerId, Incoming)>;
/// A connection of the swarm.
pub(super) type Swarmed = yamux::Muxer<Negotiated<noise::Output<Negotiated<TcpStream>>>>;

/// What can be written to and read from.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// Makes connections of the swarm, and hands those for frames out.
#[derive(Clone)]
pub(super) struct Upgrade {
    noise: noise::Config,
    tls: TlsAcceptor,
    accepted: mpsc::Sender<(PeerId, Incoming)>,
}

impl Upgrade {
    /// For the node with this key; and where the connections for frames go.
    ///
    /// # Errors
    /// The cryptography cannot be set up.
    pub(super) fn new(key: &identity::Keypair) -> Result<(Self, Accepted), String> {
        let noise = noise::Config::new(key).map_err(|error| error.to_string())?;
        let mut server = tls::make_server_config(key).map_err(|error| error.to_string())?;
        server.key_log = Arc::new(NoKeyLog);
        // No session is resumed.
        server.send_tls13_tickets = 0;
        let (accepted, receiver) = mpsc::channel(ACCEPTED_MAX);
        let upgrade = Self {
            noise,
            tls: TlsAcceptor::from(Arc::new(server)),
            accepted,
        };
        Ok((upgrade, receiver))
    }

    /// This node has dialled.
    pub(super) async fn outbound(self, socket: TcpStream) -> io::Result<(PeerId, Swarmed)> {
        let (name, socket) = dialer_select_proto(socket, [NOISE], Version::V1Lazy)
            .await
            .map_err(io::Error::other)?;
        let secured = self.noise.upgrade_outbound(socket, name).await;
        let (peer, socket) = secured.map_err(io::Error::other)?;
        let muxing = yamux::Config::default();
        let (name, socket) = dialer_select_proto(socket, muxing.protocol_info(), Version::V1Lazy)
            .await
            .map_err(io::Error::other)?;
        Ok((peer, muxing.upgrade_outbound(socket, name).await?))
    }

    /// Somebody has dialled this node. An error also where that was for frames: the swarm has
    /// nothing more to do with it.
    pub(super) async fn inbound(self, socket: TcpStream) -> io::Result<(PeerId, Swarmed)> {
        let (name, socket) = listener_select_proto(socket, [NOISE, DIRECT])
            .await
            .map_err(io::Error::other)?;
        if name == DIRECT {
            let socket = BufReader::with_capacity(READ_BYTES, socket);
            let stream = self.tls.accept(socket).await?;
            let peer = peer(stream.get_ref().1)?;
            if self.accepted.try_send((peer, Box::new(stream))).is_err() {
                debug!(%peer, "too many connections for frames at once");
            }
            return Err(io::Error::other("a connection for frames"));
        }
        let secured = self.noise.upgrade_inbound(socket, name).await;
        let (peer, socket) = secured.map_err(io::Error::other)?;
        let muxing = yamux::Config::default();
        let (name, socket) = listener_select_proto(socket, muxing.protocol_info())
            .await
            .map_err(io::Error::other)?;
        Ok((peer, muxing.upgrade_inbound(socket, name).await?))
    }
}

/// Makes connections for frames.
pub(super) struct Dialler(TlsConnector);

impl Dialler {
    /// For the node with this key.
    ///
    /// # Errors
    /// The cryptography cannot be set up.
    pub(super) fn new(key: &identity::Keypair) -> Result<Self, String> {
        let libp2p = tls::make_client_config(key, None).map_err(|error| error.to_string())?;
        // The library's order begins with ChaCha20, which takes four times as long where there are
        // instructions for AES (docs/benchmarks.md, 2026-11-28, late at night).
        let provider = CryptoProvider {
            cipher_suites: vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256],
            ..aws_lc_rs::default_provider()
        };
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&version::TLS13])
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(OfLibp2p))
            .with_client_cert_resolver(libp2p.client_auth_cert_resolver);
        config.alpn_protocols = libp2p.alpn_protocols;
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }

    /// Who is at the other end, and the connection.
    pub(super) async fn direct(&self, socket: TcpStream) -> io::Result<(PeerId, Outgoing)> {
        let (_, socket) = dialer_select_proto(socket, [DIRECT], Version::V1)
            .await
            .map_err(io::Error::other)?;
        // It stands for no name: none is sent.
        let nobody = ServerName::from(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let stream = self.0.connect(nobody, socket).await?;
        let peer = peer(stream.get_ref().1)?;
        Ok((peer, Box::new(stream)))
    }
}

fn peer(connection: &CommonState) -> io::Result<PeerId> {
    let certificates = connection.peer_certificates().unwrap_or_default();
    let [certificate] = certificates else {
        return Err(io::Error::other("not one certificate"));
    };
    let certificate = certificate::parse(certificate).map_err(io::Error::other)?;
    Ok(certificate.peer_id())
}

/// A certificate is one of libp2p (specs/tls/tls.md): signed by the key that it tells, for the key of
/// the connection. Whether that is the peer's is seen when the connection is there.
#[derive(Debug)]
struct OfLibp2p;

fn refused(_: impl std::error::Error) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

impl ServerCertVerifier for OfLibp2p {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        certificate::parse(certificate).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(
            rustls::PeerIncompatible::Tls12NotOfferedOrEnabled,
        ))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let certificate = certificate::parse(certificate).map_err(refused)?;
        certificate
            .verify_signature(signed.scheme, message, signed.signature())
            .map_err(refused)?;
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        // Nodes of this program make certificates of the first kind.
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ED25519,
        ]
    }
}
