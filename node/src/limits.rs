//! How many requests a node works on at once: beyond it answers 429 at once instead of letting
//! them queue (the way of kube-apiserver's `--max-requests-inflight`).

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use futures::StreamExt as _;
use http::{Method, StatusCode};
use krake_kube_api::ApiError;
use krake_kube_api::service::failure;
use krake_kube_api::service::query::is_watch;
use tokio::sync::Semaphore;

/// Requests that read, at once: kube-apiserver's default.
const READING: usize = 400;
/// Requests that change something, at once: kube-apiserver's default.
const CHANGING: usize = 200;
/// Watches at once; each costs a task and some kilobytes.
const WATCHING: usize = 4000;

/// The slots that are free. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Limits {
    reading: Arc<Semaphore>,
    changing: Arc<Semaphore>,
    watching: Arc<Semaphore>,
}

impl Default for Limits {
    fn default() -> Self {
        Self::new(READING, CHANGING, WATCHING)
    }
}

impl Limits {
    /// So many at once of each kind.
    pub fn new(reading: usize, changing: usize, watching: usize) -> Self {
        let slots = |count| Arc::new(Semaphore::new(count));
        Self {
            reading: slots(reading),
            changing: slots(changing),
            watching: slots(watching),
        }
    }
}

/// Works on the request when there is a slot for it, until its answer is sent; else 429.
pub async fn limit(State(limits): State<Limits>, request: Request, next: Next) -> Response {
    let reads = matches!(
        *request.method(),
        Method::GET | Method::HEAD | Method::OPTIONS
    );
    let watches = request.method() == Method::GET && is_watch(request.uri().query());
    let (slots, what) = match (watches, reads) {
        (true, _) => (limits.watching, "watches"),
        (false, true) => (limits.reading, "requests that read"),
        (false, false) => (limits.changing, "requests that change something"),
    };
    let Ok(slot) = slots.try_acquire_owned() else {
        let error = ApiError {
            retry_after: Some(1),
            ..ApiError::new(
                StatusCode::TOO_MANY_REQUESTS.as_u16(),
                "TooManyRequests",
                format!("this node has as many {what} as it takes; try again, or ask another node"),
            )
        };
        return failure(&error);
    };
    let response = next.run(request).await;
    if !watches {
        return response;
    }
    // A watch lasts as long as its body.
    response.map(|body| {
        let held = body.into_data_stream().map(move |piece| {
            let _held = &slot;
            piece
        });
        Body::from_stream(held)
    })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::Router;
    use axum::middleware::from_fn_with_state;
    use axum::routing::get;
    use bytes::Bytes;
    use http::header;
    use tower::ServiceExt as _;

    use super::*;

    fn request(method: Method, path: &str) -> Request {
        Request::builder()
            .method(method)
            .uri(path)
            .body(Body::empty())
            .unwrap()
    }

    #[tokio::test]
    async fn beyond_the_limit_the_answer_is_429_and_other_kinds_go_on() {
        let limits = Limits::new(2, 1, 1);
        let (started, mut working) =
            tokio::sync::mpsc::channel::<tokio::sync::oneshot::Sender<()>>(8);
        let slow = move || async move {
            let (finish, finished) = tokio::sync::oneshot::channel();
            started.send(finish).await.unwrap();
            let _ = finished.await;
            "done"
        };
        let endless = || async {
            let stream = futures::stream::pending::<Result<Bytes, Infallible>>();
            Body::from_stream(stream)
        };
        let app = Router::new()
            .route("/slow", get(slow.clone()).post(slow))
            .route("/events", get(endless))
            .layer(from_fn_with_state(limits, limit));
        let begin = |method| tokio::spawn(app.clone().oneshot(request(method, "/slow")));
        let posted = begin(Method::POST);
        let finish = working.recv().await.unwrap();

        let refused = app.clone().oneshot(request(Method::POST, "/slow")).await;
        let refused = refused.unwrap();
        assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(refused.headers()[header::RETRY_AFTER], "1");
        let body = axum::body::to_bytes(refused.into_body(), 10_000)
            .await
            .unwrap();
        let status: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(status["reason"], "TooManyRequests");
        assert_eq!(status["details"]["retryAfterSeconds"], 1);

        let read = begin(Method::GET);
        working.recv().await.unwrap().send(()).unwrap();
        assert_eq!(read.await.unwrap().unwrap().status(), StatusCode::OK);
        finish.send(()).unwrap();
        assert_eq!(posted.await.unwrap().unwrap().status(), StatusCode::OK);
        let again = begin(Method::POST);
        working.recv().await.unwrap().send(()).unwrap();
        assert_eq!(again.await.unwrap().unwrap().status(), StatusCode::OK);

        let watch = || {
            app.clone()
                .oneshot(request(Method::GET, "/events?watch=true"))
        };
        let first = watch().await.unwrap();
        assert_eq!(first.status(), StatusCode::OK);
        let second = watch().await.unwrap();
        assert_eq!(second.status(), StatusCode::TOO_MANY_REQUESTS);
        drop(first);
        assert_eq!(watch().await.unwrap().status(), StatusCode::OK);
    }
}
