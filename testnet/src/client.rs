//! Talking to a node as its operator: through its Unix socket.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};

const REQUEST_TIME: Duration = Duration::from_secs(20);

/// A way to one node.
#[derive(Debug, Clone)]
pub struct NodeClient {
    http: reqwest::Client,
    site: String,
}

/// `error: cause: cause`, without repetitions: reqwest hides what happened in the causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let next = cause.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = cause.source();
    }
    text
}

impl NodeClient {
    /// A client for the node of `site` at this socket, which need not be there yet.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub fn new(site: &str, socket: &Path) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder()
            .unix_socket(socket)
            .timeout(REQUEST_TIME)
            .build()?;
        Ok(Self {
            http,
            site: site.to_owned(),
        })
    }

    async fn answer(&self, request: reqwest::RequestBuilder) -> anyhow::Result<Value> {
        let site = &self.site;
        let response = request.send().await.map_err(|error| {
            anyhow::anyhow!("the node of {site} does not answer: {}", chain(&error))
        })?;
        let status = response.status();
        let text = response
            .text()
            .await
            .with_context(|| format!("the node of {site} broke off its answer"))?;
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|_| text.clone().into());
        if status.is_success() {
            return Ok(value);
        }
        // problem+json has `detail`, a Kubernetes Status has `message`.
        let detail = ["detail", "message"]
            .iter()
            .find_map(|field| value[field].as_str())
            .unwrap_or_else(|| text.trim());
        bail!("{detail} [{} from {site}]", status.as_u16())
    }

    /// GET.
    ///
    /// # Errors
    /// When the node does not answer, or with an error.
    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.answer(self.http.get(format!("http://node{path}")))
            .await
    }

    /// POST of a JSON body.
    ///
    /// # Errors
    /// As [`NodeClient::get`].
    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let request = self.http.post(format!("http://node{path}"));
        self.answer(request.json(body)).await
    }

    /// Server-side apply of an object in YAML.
    ///
    /// # Errors
    /// As [`NodeClient::get`].
    pub async fn apply(&self, path: &str, yaml: &str) -> anyhow::Result<Value> {
        let request = self
            .http
            .patch(format!(
                "http://node{path}?fieldManager=krake-testnet&force=true"
            ))
            .header("content-type", "application/apply-patch+yaml")
            .body(yaml.to_owned());
        self.answer(request).await
    }

    /// Whether the node is ready to serve.
    pub async fn is_ready(&self) -> bool {
        self.get("/readyz").await.is_ok()
    }

    /// An invitation for a site.
    ///
    /// # Errors
    /// As [`NodeClient::get`].
    pub async fn invite(&self, site: &str) -> anyhow::Result<String> {
        let answer = self.post("/v1/tokens", &json!({"site": site})).await?;
        let token = answer["token"].as_str();
        Ok(token.context("the node's answer has no token")?.to_owned())
    }

    /// Sets the sites that this node neither hears nor speaks to.
    ///
    /// # Errors
    /// As [`NodeClient::get`].
    pub async fn block<'a>(&self, sites: impl Iterator<Item = &'a String>) -> anyhow::Result<()> {
        let sites: Vec<&String> = sites.collect();
        self.post("/v1/testnet/block", &json!({"sites": sites}))
            .await?;
        Ok(())
    }

    /// Changes a metric of the node's site.
    ///
    /// # Errors
    /// As [`NodeClient::get`].
    pub async fn metric(&self, name: &str, value: f64) -> anyhow::Result<()> {
        self.post("/v1/testnet/metric", &json!({"name": name, "value": value}))
            .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_that_is_not_there_is_named() {
        let client = NodeClient::new("oslo", Path::new("/does/not/exist.sock")).unwrap();
        assert!(!client.is_ready().await);
        let error = client.get("/v1/status").await.unwrap_err().to_string();
        assert!(
            error.contains("the node of oslo does not answer"),
            "{error}"
        );
        assert!(error.contains("No such file"), "{error}");
    }
}
