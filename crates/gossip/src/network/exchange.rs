//! Members tell each other the reports that gossip has missed.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::StreamExt;
use krake_model::codec;
use krake_model::report::REPORT_BYTES_MAX;
use libp2p::{PeerId, Stream};
use tokio::sync::{Semaphore, mpsc};
use tracing::debug;

use super::shared::Shared;
use crate::streams::{self, CALL_BYTES_MAX};
use crate::view::{self, Digest, Missing};

/// Version of the messages of the report exchange.
pub(super) const EXCHANGE_VERSION: u8 = 1;
/// An exchange takes no longer where it is asked for,
const ASK_TIME: Duration = Duration::from_secs(5);
/// and where it is answered.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Exchanges answered at once at most.
const EXCHANGES_AT_ONCE: usize = 128;

pub(super) async fn take_reports(
    mut incoming: libp2p_stream::IncomingStreams,
    shared: Arc<Shared>,
) {
    let exchanges = Arc::new(Semaphore::new(EXCHANGES_AT_ONCE));
    while let Some((peer, stream)) = incoming.next().await {
        if !shared.is_member(&peer) {
            continue;
        }
        let Ok(slot) = Arc::clone(&exchanges).try_acquire_owned() else {
            // It asks again soon, or somebody else.
            debug!(%peer, "too many exchanges of reports at once");
            continue;
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let _slot = slot;
            let answered = tokio::time::timeout(ANSWER_TIME, answer(&shared, stream)).await;
            if let Err(error) = answered.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                debug!(%peer, %error, "reports could not be sent");
            }
        });
    }
}

async fn answer(shared: &Shared, mut stream: Stream) -> io::Result<()> {
    let Some(question) = streams::read(&mut stream, REPORT_BYTES_MAX * 4).await? else {
        return Ok(());
    };
    let result = codec::decode::<Digest>(EXCHANGE_VERSION, &question, REPORT_BYTES_MAX * 4)
        .and_then(|digest| {
            let missing = view::missing(&shared.view.borrow(), &digest, CALL_BYTES_MAX / 2);
            codec::encode(EXCHANGE_VERSION, &missing)
        })
        .map_err(|error| error.to_string());
    streams::answer(&mut stream, result).await
}

pub(super) async fn exchange_reports(
    mut wanted: mpsc::Receiver<PeerId>,
    shared: Weak<Shared>,
    mut control: libp2p_stream::Control,
) {
    while let Some(peer) = wanted.recv().await {
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let digest = view::digest(&shared.view.borrow());
        let Ok(question) = codec::encode(EXCHANGE_VERSION, &digest) else {
            continue;
        };
        match streams::ask(&mut control, peer, streams::REPORTS, &question, ASK_TIME).await {
            Ok(answer) => {
                match codec::decode::<Missing>(EXCHANGE_VERSION, &answer, CALL_BYTES_MAX) {
                    Ok(missing) => {
                        for report in missing.0 {
                            shared.take_report(report);
                        }
                    }
                    Err(error) => debug!(%peer, %error, "an exchange of reports is not readable"),
                }
            }
            Err(error) => debug!(%error, "no exchange of reports"),
        }
    }
}
