"""The cascade: the detached shadow answers, and where it is unsure the attached model, or a remote one, takes over.

prompt -> shadow -> answer, confidence      confidence >= threshold: the shadow's answer stands
                                            confidence <  threshold: the attached model answers, or goes on from there

trace          what the shadow thought of each of its tokens
signals        traces -> one number in [0, 1], the more the surer
scorer         that number -> a calibrated confidence: the expected quality of the shadow's answer
bounds         upper bounds of a risk that hold for every distribution
calibration    outcomes on data with references -> the threshold that keeps a promise; `cascade.json`
curve          quality against the share of answers that were asked for, and the areas
decoding       running the two networks, the attached one on the states that the shadow has computed
remote         an OpenAI-compatible endpoint in the place of the attached model
cascade        `ShadowCascade`
"""
