//! Questions between members: one stream per direction and pair, with numbered questions and
//! answers in any order. A stream per question would cost a negotiation each, and the library
//! drops streams that arrive faster than they are taken.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::io::BufReader;
use futures::{AsyncReadExt, StreamExt};
use krake_model::ids::NodeId;
use libp2p::{PeerId, Stream};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tracing::debug;

use crate::network::Handler;
use crate::network::shared::Shared;
use crate::streams::{self, CALL_BYTES_MAX, CALLS, Gathered};

/// Questions that wait to be written to one peer at most; more wait where they are asked.
const QUESTIONS_MAX: usize = 256;
/// Answers that wait to be written to one peer at most.
const ANSWERS_MAX: usize = 64;
/// Questions whose asker may have given up are looked for when so many are open.
const OPEN_MANY: usize = 1024;
/// A question without a text is a ping: whoever is there answers, without asking the handler.
const PING: &[u8] = &[];
/// A message begins with the number of the question.
const NUMBER_BYTES: usize = 8;
/// Status byte of an answer.
const ANSWERED: u8 = 0;
const REFUSED: u8 = 1;

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The stream could not be opened or broke; the question may have been heard or not.
    Broken(String),
    /// The peer answered with an error.
    Refused(String),
}

type Answer = oneshot::Sender<Result<Vec<u8>, Fault>>;

struct Question {
    bytes: Vec<u8>,
    answer: Answer,
}

/// The lines to other members.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    open: Mutex<BTreeMap<NodeId, mpsc::Sender<Question>>>,
}

impl Lines {
    /// Ends the lines to all but these.
    pub(crate) fn retain(&self, keep: impl Fn(&NodeId) -> bool) {
        self.open.lock().retain(|node, _| keep(node));
    }

    /// Asks for a sign of life; waits until it is there or the stream breaks.
    pub(crate) async fn ping(
        &self,
        runtime: &tokio::runtime::Handle,
        control: &libp2p_stream::Control,
        to: (NodeId, PeerId),
    ) -> Result<(), Fault> {
        let answer = self.ask(runtime, control, to, PING.to_vec()).await;
        answer.map(|_| ())
    }

    /// Asks; waits until there is an answer or the stream breaks.
    pub(crate) async fn ask(
        &self,
        runtime: &tokio::runtime::Handle,
        control: &libp2p_stream::Control,
        (node, peer): (NodeId, PeerId),
        bytes: Vec<u8>,
    ) -> Result<Vec<u8>, Fault> {
        let line = {
            let mut open = self.open.lock();
            let line = open.entry(node).or_insert_with(|| {
                let (sender, receiver) = mpsc::channel(QUESTIONS_MAX);
                runtime.spawn(run_line(receiver, control.clone(), peer));
                sender
            });
            line.clone()
        };
        let (answer, answered) = oneshot::channel();
        let ended = || Fault::Broken("the network is ending".to_owned());
        line.send(Question { bytes, answer })
            .await
            .map_err(|_| ended())?;
        answered.await.unwrap_or_else(|_| Err(ended()))
    }
}

async fn run_line(
    mut questions: mpsc::Receiver<Question>,
    mut control: libp2p_stream::Control,
    peer: PeerId,
) {
    while let Some(first) = questions.recv().await {
        match streams::open(&mut control, peer, CALLS).await {
            Ok(stream) => {
                let reason = ask_all(stream, first, &mut questions).await;
                debug!(%peer, reason, "the stream for questions ended");
            }
            Err(reason) => {
                let _ = first.answer.send(Err(Fault::Broken(reason)));
            }
        }
    }
}

/// Asks until the stream breaks or nobody can ask any more; returns why.
async fn ask_all(
    stream: Stream,
    first: Question,
    questions: &mut mpsc::Receiver<Question>,
) -> String {
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::with_capacity(streams::READ_BYTES, reader);
    let waiting: Mutex<BTreeMap<u64, Answer>> = Mutex::default();
    let write = async {
        let mut next = Some(first);
        let (mut number, mut gathered) = (0_u64, Gathered::default());
        while let Some(Question { bytes, answer }) = next {
            if !answer.is_closed() {
                let mut waiting = waiting.lock();
                if waiting.len() >= OPEN_MANY {
                    waiting.retain(|_, answer| !answer.is_closed());
                }
                waiting.insert(number, answer);
                drop(waiting);
                gathered.push(&[&number.to_be_bytes(), &bytes]);
                number += 1;
            }
            next = (!gathered.is_full())
                .then(|| questions.try_recv().ok())
                .flatten();
            if next.is_none() {
                if let Err(error) = gathered.write(&mut writer).await {
                    return error.to_string();
                }
                next = questions.recv().await;
            }
        }
        "nobody asks any more".to_owned()
    };
    let read = async {
        loop {
            let message = match streams::read(&mut reader, CALL_BYTES_MAX).await {
                Ok(Some(message)) => message,
                Ok(None) => return "the stream ended without an answer".to_owned(),
                Err(error) => return error.to_string(),
            };
            let Some((number, [status, answer @ ..])) = split(&message) else {
                return "an answer is not readable".to_owned();
            };
            let result = match *status {
                ANSWERED => Ok(answer.to_vec()),
                _ => Err(Fault::Refused(String::from_utf8_lossy(answer).into_owned())),
            };
            if let Some(waiting) = waiting.lock().remove(&number) {
                let _ = waiting.send(result);
            }
        }
    };
    let reason = tokio::select! {
        reason = write => reason,
        reason = read => reason,
    };
    for answer in waiting.into_inner().into_values() {
        let _ = answer.send(Err(Fault::Broken(reason.clone())));
    }
    reason
}

fn split(message: &[u8]) -> Option<(u64, &[u8])> {
    let (number, rest) = message.split_first_chunk::<NUMBER_BYTES>()?;
    Some((u64::from_be_bytes(*number), rest))
}

/// Answers what members ask, on as many streams as they open.
pub(crate) async fn take_calls(
    mut incoming: libp2p_stream::IncomingStreams,
    shared: Arc<Shared>,
    handler: Arc<dyn Handler>,
) {
    while let Some((peer, stream)) = incoming.next().await {
        tokio::spawn(answer_all(
            peer,
            stream,
            Arc::clone(&shared),
            Arc::clone(&handler),
        ));
    }
}

async fn answer_all(peer: PeerId, stream: Stream, shared: Arc<Shared>, handler: Arc<dyn Handler>) {
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::with_capacity(streams::READ_BYTES, reader);
    let (answers, mut ready) = mpsc::channel::<Vec<u8>>(ANSWERS_MAX);
    let read = async {
        loop {
            let question = match streams::read(&mut reader, CALL_BYTES_MAX).await {
                Ok(Some(question)) => question,
                Ok(None) => return,
                Err(error) => return debug!(%peer, %error, "questions end"),
            };
            let Some(node) = shared.member(&peer) else {
                return;
            };
            shared.heard(node);
            shared.traffic.questions.fetch_add(1, Ordering::Relaxed);
            if let Some((number, PING)) = split(&question) {
                let answer = [&number.to_be_bytes()[..], &[ANSWERED]].concat();
                let _ = answers.send(answer).await;
                continue;
            }
            // When too many are being answered the rest waits in the stream, and then at the asker.
            let Ok(permit) = Arc::clone(&shared.calls).acquire_owned().await else {
                return;
            };
            let (handler, answers) = (Arc::clone(&handler), answers.clone());
            tokio::spawn(async move {
                let Some((number, question)) = split(&question) else {
                    return;
                };
                let (status, answer) = match handler.call(node, question).await {
                    Ok(answer) => (ANSWERED, answer),
                    Err(reason) => (REFUSED, reason.into_bytes()),
                };
                let message = [&number.to_be_bytes()[..], &[status], &answer].concat();
                let _ = answers.send(message).await;
                drop(permit);
            });
        }
    };
    let write = async {
        let mut gathered = Gathered::default();
        while let Some(first) = ready.recv().await {
            gathered.push(&[&first]);
            while !gathered.is_full()
                && let Ok(next) = ready.try_recv()
            {
                gathered.push(&[&next]);
            }
            if let Err(error) = gathered.write(&mut writer).await {
                return debug!(%peer, %error, "an answer could not be sent");
            }
        }
    };
    tokio::select! {
        () = read => {}
        () = write => {}
    }
}
