//! Members tell each other the reports that gossip has missed.

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::StreamExt;
use krake_model::codec;
use krake_model::report::REPORT_BYTES_MAX;
use libp2p::PeerId;
use tokio::sync::mpsc;
use tracing::debug;

use super::shared::Shared;
use crate::streams::{self, CALL_BYTES_MAX};
use crate::view::{self, Digest, Missing};

/// Version of the messages of the report exchange.
pub(super) const EXCHANGE_VERSION: u8 = 1;

pub(super) async fn take_reports(
    mut incoming: libp2p_stream::IncomingStreams,
    shared: Arc<Shared>,
) {
    while let Some((peer, mut stream)) = incoming.next().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            if !shared.is_member(&peer) {
                return;
            }
            let Ok(Some(question)) = streams::read(&mut stream, REPORT_BYTES_MAX * 4).await else {
                return;
            };
            let result = codec::decode::<Digest>(EXCHANGE_VERSION, &question, REPORT_BYTES_MAX * 4)
                .and_then(|digest| {
                    let missing = view::missing(&shared.view.borrow(), &digest, CALL_BYTES_MAX / 2);
                    codec::encode(EXCHANGE_VERSION, &missing)
                })
                .map_err(|error| error.to_string());
            if let Err(error) = streams::answer(&mut stream, result).await {
                debug!(%peer, %error, "reports could not be sent");
            }
        });
    }
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
        let timeout = Duration::from_secs(5);
        match streams::ask(&mut control, peer, streams::REPORTS, &question, timeout).await {
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
